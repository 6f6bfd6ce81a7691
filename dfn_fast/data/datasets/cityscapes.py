"""Cityscapes: 19 classes of 2048 x 1024 street scenes, with fine and with coarse labels.

``root`` holds the unpacked archives leftImg8bit and gtFine (and gtCoarse)::

    ROOT/
      leftImg8bit/{train,val,test,train_extra}/aachen/aachen_000000_000019_leftImg8bit.png ...
      gtFine/{train,val,test}/aachen/aachen_000000_000019_gtFine_labelIds.png ...      train (2,975), val (500), test
      gtCoarse/train_extra/augsburg/augsburg_000000_000000_gtCoarse_labelIds.png ...   train_extra (19,998)
      gtCoarse/train/aachen/aachen_000000_000019_gtCoarse_labelIds.png ...             train_coarse (2,975)

The 34 label ids become the 19 train ids as they are read; ``*_labelTrainIds.png`` is used if it is the only one.
The labels of test are not public: those in the archive hold only 255.
"""

from pathlib import Path

import cv2
import numpy as np

from dfn_fast.data.base import IGNORE, SegmentationDataset, require_folder, values_beyond
from dfn_fast.data.datasets.pairing import pair_by_stem
from dfn_fast.errors import DataError, listed
from dfn_fast.media.listing import find_images

_CLASSES = (  # name, label id, colour; in the order of the train ids
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
NUM_LABEL_IDS = 34
_IMAGE = "_leftImg8bit"

# Tables for `table[array]`. In label ids, 255 and everything that is not a class become 0, "unlabeled".
TRAIN_ID_TO_LABEL_ID = np.zeros(256, np.uint8)
TRAIN_ID_TO_LABEL_ID[: len(_CLASSES)] = [label_id for _, label_id, _ in _CLASSES]
LABEL_ID_TO_TRAIN_ID = np.full(256, IGNORE, np.uint8)
LABEL_ID_TO_TRAIN_ID[TRAIN_ID_TO_LABEL_ID[: len(_CLASSES)]] = np.arange(len(_CLASSES))

_FOLDERS = {  # split: folder of the images and of the labels in it, kind of label
    "train": ("train", "gtFine"),
    "val": ("val", "gtFine"),
    "test": ("test", "gtFine"),
    "train_extra": ("train_extra", "gtCoarse"),
    "train_coarse": ("train", "gtCoarse"),
}
SPLITS = tuple(_FOLDERS)
COUNTS = {"train": 2975, "val": 500, "test": 1525, "train_extra": 19998, "train_coarse": 2975}


class CityscapesDataset(SegmentationDataset):
    """A split of Cityscapes, in the layout of this file's docstring; names are like ``aachen_000000_000019``."""

    name = "cityscapes"
    classes = tuple(name for name, _, _ in _CLASSES)
    palette = np.array([colour for _, _, colour in _CLASSES], np.uint8)

    def __init__(self, root: str | Path, split: str):
        root = Path(root)
        folder, kind = _FOLDERS[split]
        images = require_folder(
            root / "leftImg8bit" / folder, "the folder of the images", "Unpack the leftImg8bit archive into the root."
        )
        labels = require_folder(
            root / kind / folder, "the folder of the labels", f"Unpack the {kind} archive into the root."
        )
        found = find_images(images, nested=True)
        frames = {key.removesuffix(_IMAGE): path for key, path in found.files.items() if key.endswith(_IMAGE)}
        train_ids = find_images(labels, nested=True, ending=f"_{kind}_labelTrainIds")
        label_ids = find_images(labels, nested=True, ending=f"_{kind}_labelIds")
        label_files = _without_city(train_ids.files) | _without_city(label_ids.files)
        notes = [found.note, label_ids.note]
        if others := [str(path) for key, path in found.files.items() if not key.endswith(_IMAGE)]:
            notes.append(f"passed over {len(others)} images whose names do not end in {_IMAGE}: {listed(others)}")
        pairs = pair_by_stem(found._replace(files=_without_city(frames)), label_ids._replace(files=label_files), root)
        super().__init__(pairs, split, root, filter(None, notes))

    def class_ids(self, raw: np.ndarray, path: Path) -> np.ndarray:
        """The train ids of label ids; raises :class:`DataError` for a value that is not a label id."""
        if path.stem.endswith("_labelTrainIds"):
            return raw
        wrong = values_beyond(raw, NUM_LABEL_IDS)
        if wrong:
            raise DataError(
                f"{path}: expected label ids 0..{NUM_LABEL_IDS - 1}, or {IGNORE}, got {wrong[:5]}; unpack it again"
            )
        return cv2.LUT(raw, LABEL_ID_TO_TRAIN_ID)


def _without_city(files: dict[str, Path]) -> dict[str, Path]:
    """The files by their frames' names alone, which begin with that of the city."""
    by_name: dict[str, Path] = {}
    for key, path in files.items():
        twin = by_name.setdefault(key.rpartition("/")[2], path)
        if twin != path:
            raise DataError(f"{twin} and {path}: two frames of one name; names must be unique in a split")
    return by_name
