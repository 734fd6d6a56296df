"""One step taken again, operation by operation: where it ran, in which dtype, on which values."""
