"""The same training in several precisions, and what may be said of the difference."""
