"""A training from its first step to its last, with everything needed to go on after a crash."""
