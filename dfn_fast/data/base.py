"""The form of a data set: named classes, a palette, and pairs of image and label files (or generated scenes)."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dfn_fast.data.orientation import orientation_of, require_same_way_up
from dfn_fast.data.palettes import Palettes
from dfn_fast.errors import DataError
from dfn_fast.media.images import IGNORE as IGNORE
from dfn_fast.media.images import read_image, read_label

FILE_SECONDS = 60  # to read one file: a damaged or hostile one must not hold up everything


class Sample(NamedTuple):
    """One image of a data set."""

    image: np.ndarray  # [H, W, 3] RGB uint8
    label: np.ndarray  # [H, W] uint8: class ids, 255 = ignore
    name: str  # for outputs and errors: unique in its split, without characters that file names cannot have, except "/"


class Pair(NamedTuple):
    """The files of one sample."""

    image: Path
    label: Path
    name: str


class SegmentationDataset:
    """A split of a data set: ``dataset[i]`` is a :class:`Sample`.

    Subclasses set ``classes`` (names) and ``palette`` (``[K, 3]`` RGB uint8) and pass their pairs. If the label files
    do not hold class ids, the subclass overrides :meth:`class_ids`. ``notes`` say how the files were read where that is
    not obvious: who chose the split, which files were passed over.
    """

    name: str = ""
    classes: tuple[str, ...] = ()
    palette: np.ndarray = np.zeros((0, 3), np.uint8)
    notes: Sequence[str] = ()  # sentences without a full stop
    palettes: Palettes | None = None  # against which the colours of palette labels are held

    def __init__(self, pairs: list[Pair], split: str, where: str | Path, notes: Iterable[str] = ()):
        self.pairs, self.split, self.where = pairs, split, where
        self.notes = list(notes)
        if not pairs:
            how = "".join(f". {note}" for note in self.notes)
            raise DataError(f"{where}: split {split!r} of data set {self.name!r} has no images{how}")

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.pairs)

    def names(self) -> list[str]:
        """The samples' names in order, without reading a file."""
        return [pair.name for pair in self.pairs]

    def class_ids(self, raw: np.ndarray, path: Path) -> np.ndarray:
        """The label file's values as class ids and 255; by default unchanged."""
        if self.palettes is not None:
            self.palettes.compare(raw, path)
        return raw

    def label(self, index: int) -> np.ndarray:
        """The label of a sample alone, ``[H, W]`` class ids and 255, without reading its image."""
        pair = self.pairs[index]
        return self.class_ids(read_label(pair.label), pair.label)

    def label_orientation(self, index: int) -> int:
        """The EXIF orientation of a label's file, which :meth:`label` has undone: 1 for upright."""
        return orientation_of(self.pairs[index].label)

    def __getitem__(self, index: int) -> Sample:
        return self.read(index, [])

    def read(self, index: int, remarks: list[str]) -> Sample:
        """A sample from its files. ``remarks`` gets a few words on whatever in the image is not read as it is."""
        pair = self.pairs[index]
        image = read_image(pair.image, remarks)
        label = self.label(index)
        turned = self.label_orientation(index)
        if remarks or turned > 1:
            require_same_way_up(image, label, (orientation_of(pair.image), turned), (pair.image, pair.label))
        self.check_sample(image, label, pair)
        return Sample(image, label, pair.name)

    def check_sample(self, image: np.ndarray, label: np.ndarray, pair: Pair) -> None:
        """Raises :class:`DataError` if sizes differ, or if the label holds a value that is not a class."""
        self.check_size(image.shape[:2], label.shape, pair)
        self.check_values(label, pair.label)

    def check_size(self, image: tuple[int, ...], label: tuple[int, ...], pair: Pair) -> None:
        """Raises :class:`DataError` if the (height, width) of an image and of its label differ."""
        if image != label:
            raise DataError(
                f"{pair.label}: expected a label of the image's size {image[1]}x{image[0]} ({pair.image}), "
                f"got {label[1]}x{label[0]}"
            )

    def check_values(self, label: np.ndarray, path: Path) -> None:
        """Raises :class:`DataError` if the label, which was read from ``path``, holds a value that is not a class."""
        wrong = values_beyond(label, self.num_classes)
        if wrong:
            raise DataError(
                f"{path}: label values {wrong[:5]} are not classes of {self.name!r}; expected "
                f"0..{self.num_classes - 1}, or {IGNORE} for pixels to ignore"
            )


def values_beyond(label: np.ndarray, count: int) -> list[int]:
    """The values in a label that are neither below ``count`` nor 255."""
    if label.max(initial=0) < count:  # much quicker than to count, and enough for a label without void
        return []
    used = np.flatnonzero(np.bincount(label.ravel(), minlength=256))
    return [int(v) for v in used if v >= count and v != IGNORE]


def require_folder(path: Path, what: str, remedy: str) -> Path:
    """``path`` if it is a folder; raises a :class:`DataError` that says what is missing and how to get it."""
    if not path.is_dir():
        raise DataError(f"{path}: {what} is missing. {remedy}")
    return path
