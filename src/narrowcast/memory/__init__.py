"""Where the memory of a training step goes, counted by storage."""
