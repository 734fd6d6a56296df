"""The loss scale as a value, and what became of each step."""
