"""Channel attention and the addition of a resized map: the Smooth Network between two convolutions."""
