"""What Narrowcast measures and decides, as values that travel as JSON."""
