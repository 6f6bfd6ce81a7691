"""Images padded to a size."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfn_fast.data.normalize import PAD_COLOUR


def bucketed(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """(height, width) rounded up to multiples: fewer sizes, and so fewer graphs. ``ValueError`` below 1."""
    if multiple < 1:
        raise ValueError(f"multiple {multiple}: expected at least 1")
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width


def pad_corner(images: Tensor, size: tuple[int, int], colour: Sequence[int] = PAD_COLOUR) -> Tensor:
    """``[B, h, w, 3]`` uint8 at the top left of ``[B, *size, 3]``, the rest in ``colour``; cut ``[:, :h, :w]`` out.

    Images of that size are returned unchanged. Raises ``ValueError`` for larger ones. The network sees the padding:
    near it, and through global pooling everywhere, scores differ from those of the image without padding.
    """
    height, width = images.shape[1:3]
    if height > size[0] or width > size[1]:
        raise ValueError(f"images of {height}x{width} cannot be padded to {size[0]}x{size[1]}")
    if (height, width) == tuple(size):
        return images
    padded = images.new_empty(images.shape[0], *size, 3)
    for channel, value in enumerate(colour):  # numbers, not a tensor: that would be a copy from the host
        padded[..., channel] = value
    padded[:, :height, :width] = images
    return padded


def pad_centred(x: Tensor, size: tuple[int, int], colour: Tensor | None = None) -> tuple[Tensor, tuple]:
    """``x`` in the middle of a larger image if a side is shorter than in ``size``, and the index that cuts it out.

    ``colour`` ``[1, 3, 1, 1]``, normalised, is that of the padding; None: 0, the mean of all images.
    """
    height, width = x.shape[2:]
    missing = [max(side - have, 0) for side, have in zip(size, (height, width), strict=True)]
    top, left = missing[0] // 2, missing[1] // 2
    inside = (..., slice(top, top + height), slice(left, left + width))
    if not any(missing):
        return x, inside
    padded = x.new_zeros(*x.shape[:2], height + missing[0], width + missing[1])
    padded = padded.contiguous(memory_format=torch.channels_last)
    if colour is not None:
        padded += colour
    padded[inside] = x
    return padded, inside
