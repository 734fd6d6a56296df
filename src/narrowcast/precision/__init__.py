"""How a precision is carried out on a device: casts, islands, rehearsal, what executed."""
