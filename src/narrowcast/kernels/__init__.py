"""Triton twins of a step on any stores: one launch for a list of tensors, each byte moved once."""
