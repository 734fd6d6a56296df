"""One training step in the only correct order."""
