"""What the parents do on the inputs: second moments of units, and the positions that rows come from."""
