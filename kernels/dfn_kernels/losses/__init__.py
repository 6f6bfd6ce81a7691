"""The losses of small scores resized to the size of their labels, without any tensor of that size."""
