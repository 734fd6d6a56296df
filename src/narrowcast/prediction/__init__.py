"""The peak of a training step without running it: traced, translated, replayed."""
