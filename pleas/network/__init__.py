"""The merged network: its widened graph, its averaged tensors, its module."""
