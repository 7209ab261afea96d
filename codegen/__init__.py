"""From an `AttentionSpec` to a kernel. Knows no FX."""

assert __name__ == "flashfuse.codegen", "import flashfuse.codegen, not the bare folder: tables must exist once"
