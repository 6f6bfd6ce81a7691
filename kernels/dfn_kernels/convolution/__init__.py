"""Convolutions fused with their bias, ReLU and residual, and Winograd's algorithm."""
