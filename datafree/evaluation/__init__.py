"""How good a network is on labelled tasks, and the table of results."""
