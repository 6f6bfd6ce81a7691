"""Convolutions with what surrounds them: bias, ReLU, residual; and Winograd's algorithm."""
