"""The module paths that vLLM users start servers from."""
