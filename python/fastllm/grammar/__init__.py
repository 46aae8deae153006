"""Structured output: from what a user asks for to the tokens that may come next, over llguidance."""
