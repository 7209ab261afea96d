"""`python -m flashfuse`."""

from __future__ import annotations

import sys

from flashfuse.command_line import main

if __name__ == "__main__":
    sys.exit(main())
