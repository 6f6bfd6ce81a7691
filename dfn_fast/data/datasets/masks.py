"""Shared by ``folder`` and ``list``: what the pixels of your own masks mean."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dfn_fast.data.base import IGNORE, Pair, SegmentationDataset
from dfn_fast.data.colours import ColourTable
from dfn_fast.data.datasets.classes import ClassTable
from dfn_fast.data.palettes import Palettes
from dfn_fast.errors import ConfigError, DataError
from dfn_fast.media.images import open_image
from dfn_fast.media.masks import read_mask


class Numbering(NamedTuple):
    """How the values of a mask become class ids: ``ignore_value`` becomes 255, to all others ``label_offset`` is added.

    What is below 0 then becomes 255, and 255 stays what it is.
    """

    ignore_value: int | None = None
    label_offset: int = 0

    def class_ids(self, num_classes: int) -> np.ndarray:
        """The class id of each value, ``[256]`` int16; 256 for a value that is no class.

        Raises :class:`ConfigError` for a value that would be both ignored and a class.
        """
        value, offset = self
        for what, number, least in (("ignore-value", value, 0), ("label-offset", offset, -IGNORE)):
            if number is not None and not least <= number <= IGNORE:
                raise ConfigError(f"--{what} {number}: expected {least}..{IGNORE}")
        if value not in (None, IGNORE) and 0 <= value + offset < num_classes:
            raise ConfigError(
                f"--ignore-value {value}: with {num_classes} classes and --label-offset {offset} this value is that of "
                f"class {value + offset}; leave the class out of the table, or the option"
            )
        ids = np.arange(256, dtype=np.int16) + np.int16(offset)
        ids[ids >= num_classes] = 256
        ids[ids < 0] = ids[IGNORE] = IGNORE
        if value is not None:
            ids[value] = IGNORE
        return ids

    @property
    def notes(self) -> list[str]:
        texts = [] if self.ignore_value is None else [f"value {self.ignore_value} of the masks is ignored"]
        if self.label_offset:
            below = f"; values below {-self.label_offset} are ignored" if self.label_offset < 0 else ""
            texts.append(f"a class id is a mask's value {self.label_offset:+}{below}")
        return texts


class MaskDataset(SegmentationDataset):
    """Masks with class ids in one channel, or with the colours of a table in three."""

    def __init__(
        self,
        pairs: list[Pair],
        split: str,
        where: str | Path,
        table: ClassTable,
        numbering: Numbering,
        notes: Iterable[str] = (),
        samples: Iterable[Path] = (),
    ):
        """``samples`` are masks of other splits."""
        self.classes, self.palette, self._numbering = table.names, table.palette, numbering
        self._class_ids = numbering.class_ids(len(table.names))
        self.palettes = Palettes(table.colours, table.source, samples, self._class_ids)
        self._colours = ColourTable(table.colours, table.names, table.source)
        super().__init__(pairs, split, where, [*notes, *numbering.notes])
        with contextlib.suppress(DataError), open_image(pairs[0].label, "label") as image:
            if table.colours and image.mode in ("RGB", "RGBA"):
                self.notes = [*self.notes, f"masks in three channels are read by the colours in {table.source}"]

    def label(self, index: int) -> np.ndarray:
        path = self.pairs[index].label
        return self.class_ids(read_mask(path), path)

    def class_ids(self, raw: np.ndarray, path: Path) -> np.ndarray:
        numbered = self._numbering != Numbering()
        if raw.ndim == 3:
            ids = self._colours.ids(raw, path)
            if numbered and self._colours.colours:
                raise DataError(
                    f"{path}: --ignore-value and --label-offset are for masks of class ids, but this one has the "
                    f"colours in {self._colours.source}; leave them out"
                )
            raw = ids
        else:
            raw = super().class_ids(raw, path)
        if not numbered:
            return raw
        ids = self._class_ids[raw]
        if (wrong := ids > IGNORE).any():
            first, most = -self._numbering.label_offset, self.num_classes - 1 - self._numbering.label_offset
            raise DataError(
                f"{path}: label values {np.unique(raw[wrong])[:5].tolist()} are not classes of {self.name!r}; expected "
                f"{max(0, first)}..{most}, or {IGNORE} for pixels to ignore (--label-offset "
                f"{self._numbering.label_offset})"
            )
        return ids.astype(np.uint8)
