"""Normalises images for the network, with ImageNet's mean and standard deviation."""

from functools import lru_cache

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB, of values in 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)
PAD_COLOUR = tuple(round(255 * mean) for mean in IMAGENET_MEAN)


def normalize(
    images: Tensor, dtype: torch.dtype = torch.float32, constants: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """``(images / 255 - mean) / std`` with ImageNet's mean and standard deviation.

    ``[B, 3, H, W]`` RGB uint8 of any layout -> the same shape in ``dtype``, channels_last, on the images' device.
    ``constants``: those of :func:`scale_and_shift`, for a caller that keeps them. Raises ``ValueError`` for another
    shape or dtype: values in 0..1 would pass for a black image.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"normalize expects uint8 images [B, 3, H, W], got {images.dtype} {list(images.shape)}")
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    scale, shift = scale_and_shift(images.device, arithmetic) if constants is None else constants
    x = images.to(scale.dtype, memory_format=torch.channels_last)
    return torch.addcmul(shift, x, scale).to(dtype, memory_format=torch.channels_last)


@lru_cache(maxsize=16)
def scale_and_shift(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors of ``x * scale + shift``, cached on the device: copying them for each batch would wait for it."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (1 / (255 * std)).to(device, dtype), (-mean / std).to(device, dtype)
