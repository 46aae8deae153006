"""Tool calls: what a request offers, how each family of templates writes a call, and how calls are read back."""
