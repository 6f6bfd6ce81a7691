"""CamVid in the SegNet layout: 11 classes of street scenes, void (11) ignored.

``root`` is the folder called CamVid in SegNet's tutorial, or the one around it::

    CamVid/
      train/0001TP_006690.png ...       images: any format, 367 in train, 101 in val, 233 in test
      trainannot/0001TP_006690.png ...  class ids in one channel
      val/  valannot/  test/  testannot/
      train.txt  val.txt  test.txt      per line: train/0001TP_006690.png trainannot/0001TP_006690.png

A list's paths are relative to root. Those of the original lists begin with another machine's folder
(``/SegNet/CamVid/train/...``); their files are found by folder and stem, whatever the suffix. Files outside the root
are used only with ``--allow-outside-root``. A split without a list is everything in its two folders. ``trainval`` is
train and val.
"""

import os
from pathlib import Path, PurePosixPath

import numpy as np

from dfn_fast.data.base import IGNORE, Pair, SegmentationDataset, require_folder
from dfn_fast.data.datasets.pairing import below, checked_pairs, entries, pair_by_stem, spellings, two_paths
from dfn_fast.errors import DataError, shortened
from dfn_fast.media.listing import composed, files_by_stem, find_images

_CLASSES = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)
VOID = len(_CLASSES)
SPLITS = ("train", "val", "test", "trainval")
COUNTS = {"train": 367, "val": 101, "test": 233, "trainval": 468}


class CamVidDataset(SegmentationDataset):
    """A split of CamVid, in the layout of this file's docstring."""

    name = "camvid"
    classes = tuple(name for name, _ in _CLASSES)
    palette = np.array([colour for _, colour in _CLASSES], np.uint8)

    def __init__(self, root: str | Path, split: str, *, allow_outside_root: bool = False):
        root = Path(root)
        limit = None if allow_outside_root else root
        home = root / "CamVid" if (root / "CamVid").is_dir() else root
        parts = ("train", "val") if split == "trainval" else (split,)
        notes: list[str] = []
        super().__init__([pair for part in parts for pair in _pairs(home, part, limit, notes)], split, home, notes)

    def class_ids(self, raw: np.ndarray, path: Path) -> np.ndarray:
        return np.where(raw == VOID, np.uint8(IGNORE), raw)


def _pairs(home: Path, split: str, limit: Path | None, notes: list[str]) -> list[Pair]:
    """The pairs of a list, or of the folders; ``notes`` take what is to be said of these."""
    list_file = home / f"{split}.txt"
    if not list_file.is_file():
        remedy = f"Expected {split}.txt, or the folders {split} and {split}annot, in the root."
        images = find_images(require_folder(home / split, f"the folder of split {split!r}", remedy))
        label_folder = require_folder(home / f"{split}annot", f"the folder of the labels of {split!r}", remedy)
        labels = find_images(label_folder)
        notes += filter(None, (images.note, labels.note))
        return pair_by_stem(images, labels, home)
    folders: dict[str, dict[str, Path]] = {}
    pairs = []
    for number, line in entries(list_file, lambda line: _existing(home, line, folders, limit) is not None):
        try:
            found = _existing(home, line, folders, limit)
            fields = line.split()
            if not found and len(fields) != 2:
                raise DataError(f"expected an image and a label path, got {shortened(line)!r}")
            image, label = found or [_find(home, field, folders, limit) for field in fields]
        except DataError as error:
            raise DataError(f"{list_file}:{number}: {error}") from None
        pairs.append(Pair(image, label, image.stem))
    if not pairs:
        raise DataError(f"{list_file}: this list has no images")
    return checked_pairs(pairs, list_file)


def _existing(
    home: Path, line: str, folders: dict[str, dict[str, Path]], limit: Path | None
) -> tuple[Path, Path] | None:
    """The image and the label that a line names, if the image exists. A space may belong to a name or divide two."""
    found = [(_find(home, image, folders, limit), label) for image, label in two_paths(line)]
    pairs = [(image, _find(home, label, folders, limit)) for image, label in found if os.path.isfile(image)]
    return min(pairs, key=lambda pair: (not os.path.isfile(pair[1]), pair[0].stem != pair[1].stem), default=None)


def _find(home: Path, field: str, folders: dict[str, dict[str, Path]], limit: Path | None) -> Path:
    """The listed file, else the one with its folder's name and its stem below ``home``, else the expected path."""
    refused: DataError | None = None
    for spelling in spellings(field):
        try:
            path = below(limit, home / spelling)
            if os.path.isfile(path):
                return path
        except DataError as error:
            refused = refused or error
    listed = PurePosixPath(composed(field.replace("\\", "/")))
    folder = listed.parent.name
    if folder not in folders:
        folders[folder] = files_by_stem(below(limit, home / folder))
    if refused is not None and not listed.is_absolute() and listed.stem not in folders[folder]:
        raise refused
    return folders[folder].get(listed.stem, home / folder / listed.name)
