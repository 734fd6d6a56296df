"""Activation levers, module by module: what the tensors saved for backward are turned into."""
