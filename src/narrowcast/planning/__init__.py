"""Fitting a training into a budget: candidates, their peaks and speeds, and the choice."""
