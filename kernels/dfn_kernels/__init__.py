"""Fused operators of DFN: Triton kernels, with gradients, and the same mathematics in plain PyTorch elsewhere.

Every operator takes features of any strides and alignment and a batch of 0. For another shape, dtype or device it
raises a ValueError that names the operator and the argument. Environment variables, read at each call:

- ``DFN_KERNELS``: ``auto`` (the default), ``torch`` or ``triton``, the implementation; ``TRITON_INTERPRET=1`` runs
  Triton's kernels on a CPU.
- ``DFN_KERNELS_DEBUG=1``: debug mode. A label that is neither a class nor ``ignore_index`` raises ValueError. Each
  operator waits for the device, and an error of CUDA or Triton becomes a RuntimeError that names the operator, forward
  or backward, and its arguments' shapes: "upsample_cross_entropy, logits [2, 21, 128, 128] float32 on
  cuda:0, ...: CUDA error: an illegal memory access was encountered".
"""

from dfn_kernels.attention.channel_attention import channel_attention
from dfn_kernels.attention.upsample_add import upsample_add
from dfn_kernels.convolution.conv3x3 import conv3x3
from dfn_kernels.convolution.fused_conv import Packed, fused_conv
from dfn_kernels.images.multiscale_argmax import multiscale_argmax
from dfn_kernels.images.resize_normalize import resize_normalize
from dfn_kernels.losses.cross_entropy import upsample_cross_entropy
from dfn_kernels.losses.focal_loss import upsample_focal_loss

__all__ = [
    "Packed",
    "channel_attention",
    "conv3x3",
    "fused_conv",
    "multiscale_argmax",
    "resize_normalize",
    "upsample_add",
    "upsample_cross_entropy",
    "upsample_focal_loss",
]
