"""What every reader of a form returns: images, and outlines in the order in which they are drawn."""

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import cv2
import numpy as np

from dfn_fast.data.base import IGNORE
from dfn_fast.data.datasets.classes import require_name
from dfn_fast.data.datasets.layout import split_name
from dfn_fast.data.datasets.pairing import PairingError
from dfn_fast.data.orientation import orientation_of
from dfn_fast.errors import DataError, brief, listed, nearest
from dfn_fast.media.images import open_image
from dfn_fast.media.listing import composed

BACKGROUND = "background"
SPLITS = ("train", "val", "test")
MAX_CORNER = 1 << 15  # pixels from the image's corner: cv2 counts in 16 bits with 16 more behind the point
CIRCLE = 64  # corners of a circle or an ellipse
# What reading a part of a file raises if the part is not as expected; the file and the part are then named.
BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, RecursionError, DataError)

Region = np.ndarray  # corners [N, 2] float64 as x, y; or a mask [H, W] bool


class Picture(NamedTuple):
    """An image and how to draw its label."""

    image: Path
    split: str  # train, val or test; empty if there is none
    stem: str  # its path below images/, without the suffix
    label: Callable[[], np.ndarray]  # draws [H, W] class ids and 255


class Annotations(NamedTuple):
    """A data set of another form."""

    classes: tuple[str, ...]
    pictures: list[Picture]
    notes: list[str]
    palette: np.ndarray | None = None  # [K, 3] RGB uint8, if the form has one


class ClassIds:
    """The class ids of names: background is 0, the others follow in order; ``__ignore__`` is 255."""

    def __init__(self, names: Iterable[str], source: str | Path):
        self.source = source
        self.classes: list[str] = [BACKGROUND]
        for name in names:
            if not _is_background(name) and name != "__ignore__":
                require_name(name, self.classes, str(source))
                self.classes.append(name)
        if not 2 <= len(self.classes) <= IGNORE:
            raise DataError(
                f"{source}: expected 1..{IGNORE - 1} classes besides background, got {len(self.classes) - 1}"
            )
        self._ids = {name: i for i, name in enumerate(self.classes)} | {"__ignore__": IGNORE}

    def __getitem__(self, name: Any) -> int:
        """Raises ``ValueError`` for an unknown class."""
        if isinstance(name, str) and _is_background(name):
            return 0
        if not isinstance(name, str) or name not in self._ids:
            near = nearest(str(name)[:80], self.classes)
            raise ValueError(f"class {brief(name)} is not in {self.source}: {listed(self.classes, 20)}{near}")
        return self._ids[name]


def _is_background(name: str) -> bool:
    return name.strip("_").casefold() == BACKGROUND


class Problems(list[str]):
    """Problems in the files of ``source``, all of which are told at once."""

    def __init__(self, source: Path):
        super().__init__()
        self.source = source

    def require_none(self) -> None:
        if self:
            raise PairingError(self.source, self)


def place(path: PurePosixPath | Path) -> tuple[str, str]:
    """The split and the stem of an image at ``path`` below its data set; folders named after them are left out."""
    parts = PurePosixPath(composed(path.as_posix())).parent.parts
    splits = {split_name(part) for part in parts} & set(SPLITS)
    if len(splits) > 1:
        raise DataError(f"{path}: its folders are named after more than one split: {listed(sorted(splits))}")
    kept = [part for part in parts if split_name(part) not in SPLITS and part != "images"]
    return splits.pop() if splits else "", PurePosixPath(*kept, os.path.splitext(path.name)[0]).as_posix()


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width of an image as viewers show it, which is how labelling programs show it too."""
    with open_image(path) as image:
        width, height = image.size
    return (width, height) if orientation_of(path) >= 5 else (height, width)


def require_size(path: Path, size: tuple[Any, Any]) -> tuple[int, int]:
    """``size``, the height and width in an annotation file. Raises ``ValueError`` if the image has another."""
    found = upright_size(path)
    if found != tuple(size):
        raise ValueError(
            f"the outlines are for an image of {brief(size[1])}x{brief(size[0])}, but {path} has {found[1]}x{found[0]}"
        )
    return found


def polygon(numbers: Iterable[Any]) -> Region:
    """The corners ``x, y, x, y, ...``. Raises ``ValueError`` for what is not a polygon near an image."""
    values = [float(number) for number in numbers]
    if len(values) % 2 or len(values) < 6:
        raise ValueError(f"expected x and y of 3 corners or more, got {len(values)} numbers")
    if not all(math.isfinite(value) and abs(value) < MAX_CORNER for value in values):
        raise ValueError(f"a corner is not within {MAX_CORNER} pixels: {brief(max(values, key=abs))}")
    return np.array(values).reshape(-1, 2)


def box(left: float, top: float, right: float, bottom: float) -> Region:
    return polygon((left, top, right, top, right, bottom, left, bottom))


def ellipse(x: float, y: float, rx: float, ry: float, degrees: float = 0.0) -> Region:
    angles = np.linspace(0, 2 * np.pi, CIRCLE, endpoint=False)
    along, across = rx * np.cos(angles), ry * np.sin(angles)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return polygon(np.stack([x + along * cos - across * sin, y + along * sin + across * cos], 1).ravel())


def drawing(size: tuple[int, int], shapes: Sequence[tuple[int, Sequence[Region]]]) -> Callable[[], np.ndarray]:
    """Draws the regions of each (class id, regions) of ``shapes``, later ones on top, on background."""
    return functools.partial(_draw, size, shapes)


def _draw(size: tuple[int, int], shapes: Sequence[tuple[int, Sequence[Region]]]) -> np.ndarray:
    label = np.zeros(size, np.uint8)
    for class_id, regions in shapes:
        for region in regions:
            if region.dtype == bool:
                label[region] = class_id
            else:
                cv2.fillPoly(label, [np.rint(region).astype(np.int32)], class_id)
    return label
