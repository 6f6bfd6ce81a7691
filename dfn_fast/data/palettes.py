"""The colours of palette labels: a sign of the order in which a program numbered the classes."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dfn_fast.errors import DataError
from dfn_fast.media.images import IGNORE, open_image, read_label

Colour = tuple[int, int, int]


class Palettes:
    """The colour of each class id, from ``source`` or from the first label that has one; later labels must agree.

    A program that makes a palette anew for each image, as ``quantize`` of Pillow and many others do, numbers the
    colours by how often they occur, so that one id means another class in each file.
    """

    def __init__(
        self,
        colours: dict[int, Colour],
        source: str | Path,
        samples: Iterable[Path] = (),
        class_ids: np.ndarray | None = None,
    ):
        """``samples`` are labels of other splits, which must agree too. They are read with the first label.

        ``class_ids`` ``[256]`` has the class id of each value in a label, if it is another number.
        """
        self._class_ids = (np.arange(256) if class_ids is None else class_ids).tolist()
        self._known: dict[int, tuple[Colour, str | Path]] = {i: (colour, source) for i, colour in colours.items()}
        self._samples = list(samples)

    def compare(self, ids: np.ndarray, path: Path) -> None:
        """Raises :class:`DataError` if an id in the label file ``path`` has another colour there than is known.

        ``ids`` are the values in the file.
        """
        samples, self._samples = self._samples, []
        for sample in samples:
            try:
                ids_of_sample = read_label(sample)
            except DataError:  # whoever reads its split says so
                continue
            self._compare(ids_of_sample, sample)
        self._compare(ids, path)

    def _compare(self, ids: np.ndarray, path: Path) -> None:
        palette = _palette(path)
        if not palette:
            return
        used = np.flatnonzero(np.bincount(ids.ravel(), minlength=256))
        pairs = [(self._class_ids[value], palette[value]) for value in used.tolist() if value < len(palette)]
        self._add({i: (colour, path) for i, colour in pairs if i != IGNORE})

    def agree(self, other: "Palettes") -> None:
        """Raises :class:`DataError` if an id has another colour in ``other``, that of another split."""
        self._add(other._known)

    def _add(self, colours: dict[int, tuple[Colour, str | Path]]) -> None:
        for i, (colour, source) in colours.items():
            known, first = self._known.setdefault(i, (colour, source))
            if colour != known:
                raise DataError(
                    f"{source}: class id {i} has colour {colour} in its palette, but {known} in {first}: one id would "
                    "mean two classes. Save all labels with one palette, or with class ids in one grey channel; if the "
                    "ids are right, leave the colours out of the table of classes"
                )


def _palette(path: Path) -> list[Colour]:
    """The colours of a label's palette; none if it has no palette, or one of a single colour or of its own indices."""
    with open_image(path, "label") as image:
        values = image.getpalette("RGB") if image.mode == "P" else None
    colours = [(r, g, b) for r, g, b in zip(*[iter(values or [])] * 3, strict=False)]
    indices = all(colour == (i, i, i) for i, colour in enumerate(colours))
    return [] if indices or len(colours) > 1 == len(set(colours)) else colours
