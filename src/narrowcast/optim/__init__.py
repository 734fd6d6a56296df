"""Optimizers put together from an update rule, a store for weights and a store for states."""
