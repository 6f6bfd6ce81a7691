"""PASCAL VOC 2012: 20 classes and background, with or without the SBD augmentation.

``root`` is VOC2012, VOCdevkit or the folder around it::

    VOCdevkit/VOC2012/
      JPEGImages/2007_000032.jpg ...
      SegmentationClass/2007_000032.png ...     splits train (1,464), val (1,449), trainval (2,913)
      SegmentationClassAug/2007_000032.png ...  split train_aug (10,582)
      ImageSets/Segmentation/{train,val,trainval}.txt, and train_aug.txt if there is one

``train_aug.txt`` may also lie in VOC2012 itself; without it, ``train_aug`` is SegmentationClassAug without val.
``python -m dfn_fast.data convert-sbd SBD_ROOT VOC_ROOT`` makes both from SBD's ``.mat`` files. A line of a list is an
id, or "image label" with paths below VOC2012.
"""

import contextlib
import os
from pathlib import Path

import numpy as np

from dfn_fast.data.base import Pair, SegmentationDataset, require_folder
from dfn_fast.data.datasets.pairing import Existing, below, checked_pairs, entries, spellings, two_paths
from dfn_fast.data.palettes import Palettes
from dfn_fast.errors import DataError, shortened
from dfn_fast.media.listing import files_by_stem

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
SPLITS = ("train", "val", "trainval", "train_aug")
COUNTS = {"train": 1464, "val": 1449, "trainval": 2913, "train_aug": 10582}


def voc_palette(num_classes: int) -> np.ndarray:
    """VOC's colours, ``[num_classes, 3]`` RGB uint8: the id's bits go to R, G and B in turn, highest bits first."""
    ids = np.arange(num_classes)
    palette = np.zeros((num_classes, 3), np.uint8)
    for bit in range(8):
        channel, place = bit % 3, 7 - bit // 3
        palette[:, channel] |= ((ids >> bit & 1) << place).astype(np.uint8)
    return palette


class VocDataset(SegmentationDataset):
    """A split of VOC 2012, in the layout of this file's docstring."""

    name = "voc"
    classes = VOC_CLASSES
    palette = voc_palette(len(VOC_CLASSES))

    def __init__(self, root: str | Path, split: str, *, allow_outside_root: bool = False):
        home = find_voc(Path(root))
        limit = None if allow_outside_root else Path(root)
        if split == "train_aug":
            pairs = _augmented(home, limit)
        else:
            pairs = listed_pairs(home, segmentation_list(home, split), "SegmentationClass", limit)
        where = home if split == "train_aug" else segmentation_list(home, split)
        super().__init__(checked_pairs(pairs, where), split, where)
        colours = {i: (r, g, b) for i, (r, g, b) in enumerate(self.palette.tolist())}
        self.palettes = Palettes(colours, "PASCAL VOC")


def find_voc(root: Path) -> Path:
    """The VOC2012 folder at or below ``root``."""
    for home in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (home / "JPEGImages").is_dir():
            return home
    raise DataError(
        f"{root}: expected JPEGImages in it, in its VOC2012 or in its VOCdevkit/VOC2012; "
        "give the folder of the unpacked VOCtrainval_11-May-2012.tar as root"
    )


def segmentation_list(home: Path, split: str) -> Path:
    return home / "ImageSets" / "Segmentation" / f"{split}.txt"


def listed_pairs(home: Path, list_file: Path, label_folder: str, limit: Path | None) -> list[Pair]:
    """The pairs that a list names, by ids or by "image label" paths, all of them below ``limit`` if it is given."""
    lines = _Lines(home, label_folder, limit)
    pairs = []
    for number, line in entries(list_file, lambda line: lines.by_id(line) is not None):
        try:
            pairs.append(lines.pair(line))
        except DataError as error:
            raise DataError(f"{list_file}:{number}: {error}") from None
    if pairs and not any(lines.exists(pair.label) for pair in pairs) and lines.exists(pairs[0].image):
        raise DataError(
            f"{list_file}: none of its images has a label in {home / label_folder}; VOC does not publish those of test"
        )
    return pairs


class _Lines:
    """Reads the lines of a list: an id, or else the paths of an image and a label. An id may have spaces."""

    def __init__(self, home: Path, label_folder: str, limit: Path | None):
        self.home, self.label_folder, self.limit, self.exists = home, label_folder, limit, Existing()

    def pair(self, line: str) -> Pair:
        """Raises :class:`DataError` for a line of another form, and for a path outside of ``limit``."""
        if pair := self.by_id(line):
            return pair
        fields = line.split()
        if len(fields) == 2 and fields[1] in ("1", "-1", "0") and self.by_id(fields[0]):
            raise DataError(
                f"expected an image id, got {line!r}, as in VOC's lists of one class; take the list of this name in "
                "ImageSets/Segmentation"
            )
        pairs = [(self._path(image), self._path(label)) for image, label in two_paths(line)]
        likely = [pair for pair in pairs if self.exists(pair[0])] or pairs[: len(fields) == 2]
        if likely:
            image, label = min(likely, key=lambda pair: not self.exists(pair[1]))
            return Pair(image, label, image.stem)
        if len(fields) > 1:
            raise DataError(f"expected an image id, or an image and a label path, got {shortened(line)!r}")
        return self._of(line)

    def by_id(self, line: str) -> Pair | None:
        """The pair of an id whose image exists, be it written with its suffix or without."""
        with contextlib.suppress(DataError):  # outside of limit
            for spelling in spellings(line):
                for name in (spelling, spelling.removesuffix(".jpg"), spelling.removesuffix(".png")):
                    if self.exists((pair := self._of(name)).image):
                        return pair
        return None

    def _of(self, name: str) -> Pair:
        image = below(self.limit, self.home / "JPEGImages" / f"{name}.jpg")
        return Pair(image, below(self.limit, self.home / self.label_folder / f"{name}.png"), image.stem)

    def _path(self, field: str) -> Path:
        """The path of a list's entry; DeepLab's lists write ``/JPEGImages/a.jpg`` for a path below VOC2012."""
        if os.path.isabs(field) and os.path.isfile(field):
            return below(self.limit, Path(field))
        paths = [below(self.limit, self.home / spelling.lstrip("/")) for spelling in spellings(field)]
        return next(filter(self.exists, paths), paths[0])


def _augmented(home: Path, limit: Path | None) -> list[Pair]:
    labels = require_folder(
        home / "SegmentationClassAug",
        "the folder of the augmented labels",
        f"Make it from SBD with: python -m dfn_fast.data convert-sbd SBD_ROOT {home}",
    )
    for list_file in (segmentation_list(home, "train_aug"), home / "train_aug.txt"):
        if list_file.is_file():
            return listed_pairs(home, list_file, labels.name, limit)
    val = {pair.name for pair in listed_pairs(home, segmentation_list(home, "val"), "SegmentationClass", limit)}
    return [
        Pair(home / "JPEGImages" / f"{stem}.jpg", path, stem)
        for stem, path in files_by_stem(labels).items()
        if stem not in val
    ]
