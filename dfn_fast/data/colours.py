"""Masks whose pixels are the colours of classes."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dfn_fast.data.palettes import Colour
from dfn_fast.errors import DataError
from dfn_fast.media.images import IGNORE


class ColourTable:
    """The class id of each colour that ``source``, a table of classes, has; 255 may have one too."""

    def __init__(self, colours: Mapping[int, Colour], classes: Sequence[str], source: str | Path):
        self.colours, self.classes, self.source = colours, classes, source

    def ids(self, mask: np.ndarray, path: str | Path) -> np.ndarray:
        """The class ids ``[H, W]`` of a mask ``[H, W, 3]`` RGB uint8, which was read from ``path``.

        Three equal channels are class ids if the table has no colours. Raises :class:`DataError` for a colour that is
        not in the table.
        """
        if not self.colours:
            if _is_grey(mask):
                return mask[..., 0]
            raise DataError(
                f"{path}: expected a label with one 8-bit channel or a palette, got RGB, and {self.source} has no "
                "colours; to read colours as classes, write a line `name R G B` for each class into classes.txt, or "
                "give such a table with --classes"
            )
        codes = _code(mask)
        ids = self._id_of_code[codes] - np.uint8(1)  # 0 - 1 is 255
        unknown = ids == IGNORE
        if IGNORE in self.colours:
            unknown &= codes != _code(np.array(self.colours[IGNORE], np.uint8))
        if unknown.any():
            raise self._unknown(mask, unknown, path)
        return ids

    @functools.cached_property
    def _id_of_code(self) -> np.ndarray:
        """By the 24 bits of a colour, its class id + 1, so that those without a class need no memory."""
        table = np.zeros(1 << 24, np.uint8)
        for i, colour in self.colours.items():
            table[_code(np.array(colour, np.uint8))] = (i + 1) % 256
        return table

    def _unknown(self, mask: np.ndarray, unknown: np.ndarray, path: str | Path) -> DataError:
        y, x = divmod(int(unknown.argmax()), mask.shape[1])
        colour = tuple(mask[y, x].tolist())
        distances = {
            i: sum((a - b) ** 2 for a, b in zip(known, colour, strict=True)) for i, known in self.colours.items()
        }
        near = min(distances, key=distances.__getitem__)
        what = f"class {self.classes[near]!r}" if near < len(self.classes) else f"{IGNORE} (ignored)"
        return DataError(
            f"{path}: colour {colour} at x {x}, y {y} is not in {self.source}, as that of {np.count_nonzero(unknown)} "
            f"pixels in all; nearest is {self.colours[near]} of {what}. Add the colour to the table, or save the mask "
            "without smoothed edges"
            + (", or, if its equal channels are class ids, save only one of them" if _is_grey(mask) else "")
        )


def _is_grey(mask: np.ndarray) -> bool:
    return bool((mask == mask[..., :1]).all())


def _code(colours: np.ndarray) -> np.ndarray:
    """The 24 bits of colours ``[..., 3]`` as int32."""
    r, g, b = (colours[..., i].astype(np.int32) for i in range(3))
    return r << 16 | g << 8 | b
