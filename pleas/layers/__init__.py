"""What a layer is: its weight, its norm, its rows, and which statistics a layer norm has."""
