"""Fused operators of DFN: Triton kernels, with gradients, and the same mathematics in plain PyTorch elsewhere."""

from dfn_kernels.channel_attention import channel_attention
from dfn_kernels.conv3x3 import conv3x3
from dfn_kernels.cross_entropy import upsample_cross_entropy
from dfn_kernels.focal_loss import upsample_focal_loss
from dfn_kernels.multiscale import multiscale_argmax
from dfn_kernels.preprocess import resize_normalize
from dfn_kernels.upsample_add import upsample_add

__all__ = [
    "channel_attention",
    "conv3x3",
    "multiscale_argmax",
    "resize_normalize",
    "upsample_add",
    "upsample_cross_entropy",
    "upsample_focal_loss",
]
