"""Tasks: a batch and a model give a summed loss and what it sums over."""
