"""Drop-ins for `torch.amp`: an existing loop changes its import and nothing else."""
