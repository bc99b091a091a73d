"""A parent: its architecture, filled with the weights of a checkpoint."""
