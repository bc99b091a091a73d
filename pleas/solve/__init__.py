"""The weights: least squares layer by layer, on what the merged network feeds them."""
