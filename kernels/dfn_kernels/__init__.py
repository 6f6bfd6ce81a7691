"""Fused operators of DFN: Triton kernels, with gradients, and the same mathematics in plain PyTorch elsewhere."""
