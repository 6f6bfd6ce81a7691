"""Masks as drawing and labelling programs save them: class ids in more forms than a label has, or colours."""

from pathlib import Path

import numpy as np

from dfn_fast.errors import DataError
from dfn_fast.media.images import open_image, stored_pixels

_MODES = ("L", "P", "1", "I", "I;16", "I;16B", "LA", "RGB", "RGBA")


def read_mask(path: str | Path) -> np.ndarray:
    """A mask's values, ``[H, W]`` uint8, or its colours, ``[H, W, 3]``, turned by its EXIF orientation.

    A mask of 1 bit has values 0 and 1. Raises :class:`DataError` for 16 bits with values above 255, and for pixels that
    are transparent, because it is not known what they mean.
    """
    with open_image(path, "label") as image:
        pixels, mode = stored_pixels(image, path, _MODES), image.mode
    if mode in ("LA", "RGBA"):
        if transparent := np.count_nonzero(pixels[..., -1] != 255):
            raise DataError(
                f"{path}: expected a label with one 8-bit channel or a palette, got {mode} with {transparent} "
                "transparent pixels, whose class is not known; fill them, and save the mask without an alpha channel"
            )
        pixels = pixels[..., 0] if mode == "LA" else pixels[..., :-1]
    return pixels
