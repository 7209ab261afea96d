"""From an FX graph to an `AttentionSpec` or a `Refusal`. Knows no Triton."""

assert __name__ == "flashfuse.patterns", "import flashfuse.patterns, not the bare folder: tables must exist once"
