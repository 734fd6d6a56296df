"""One training on several processes: who is there, what they agree on, how they end together."""
