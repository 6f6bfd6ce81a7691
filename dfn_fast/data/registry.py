"""The data sets by name, as the commands take them, and the layout of each on disk."""

import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dfn_fast.data.base import Sample, SegmentationDataset
from dfn_fast.data.datasets import camvid, cityscapes, coco, folder, image_list, synthetic, voc
from dfn_fast.errors import ConfigError, nearest


def _tree(module: ModuleType) -> str:
    """The indented lines of a module's docstring."""
    lines = (module.__doc__ or "").splitlines()
    return textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))


def _synthetic(split: str, *, seed: int) -> SegmentationDataset:
    return synthetic.SyntheticScenes(split, seed=seed)


@dataclass(frozen=True)
class Entry:
    """One data set. ``build`` takes root and split if ``needs_root``, else split and ``seed=``."""

    description: str  # one line
    build: Callable[..., SegmentationDataset]
    tree: str = ""  # the layout on disk, for help
    train: str = "train"  # the default splits for training and validation
    val: str = "val"
    splits: tuple[str, ...] = ()  # all splits; none if they depend on the root
    needs_root: bool = True
    free_classes: bool = False  # takes num_classes=, classes=, ignore_value= and label_offset=
    categories: bool = False  # takes classes=
    lists: bool = False  # a file in root names other files; takes allow_outside_root=
    counts: Mapping[str, int] = field(default_factory=dict)  # images of the published splits


DATASETS: dict[str, Entry] = {
    "synthetic": Entry(
        "scenes generated from a seed, nothing to download",
        _synthetic,
        splits=("train", "val"),
        needs_root=False,
    ),
    "voc": Entry(
        "PASCAL VOC 2012, 21 classes, with or without the SBD augmentation",
        voc.VocDataset,
        _tree(voc),
        splits=voc.SPLITS,
        lists=True,
        counts=voc.COUNTS,
    ),
    "cityscapes": Entry(
        "Cityscapes, 19 classes, fine and coarse labels",
        cityscapes.CityscapesDataset,
        _tree(cityscapes),
        splits=cityscapes.SPLITS,
        counts=cityscapes.COUNTS,
    ),
    "camvid": Entry(
        "CamVid in the SegNet layout, 11 classes",
        camvid.CamVidDataset,
        _tree(camvid),
        splits=camvid.SPLITS,
        lists=True,
        counts=camvid.COUNTS,
    ),
    "coco": Entry(
        "COCO's instances as the 21 VOC classes, for pre-training, or as your own categories",
        coco.CocoDataset,
        _tree(coco),
        categories=True,
        lists=True,
        train="train2017",
        val="val2017",
    ),
    "folder": Entry(
        "your own folders images/ and masks/, paired by name",
        folder.FolderDataset,
        _tree(folder),
        free_classes=True,
    ),
    "list": Entry(
        "your own text files of image<TAB>label",
        image_list.ListDataset,
        _tree(image_list),
        free_classes=True,
        lists=True,
    ),
}


class JoinedDataset(SegmentationDataset):
    """Several splits of one data set as one. If names repeat, the split goes in front, as in ``train_coarse/...``."""

    def __init__(self, parts: list[SegmentationDataset]):
        self.parts = parts
        self.name, self.classes, self.palette = parts[0].name, parts[0].classes, parts[0].palette
        self._places = [(part, index) for part in parts for index in range(len(part))]
        names = [name for part in parts for name in part.names()]
        if len(set(names)) < len(names):
            names = [f"{part.split}/{name}" for part in parts for name in part.names()]
        self._names = names
        self.pairs = [pair for part in parts for pair in part.pairs]
        self.notes = list(dict.fromkeys(note for part in parts for note in part.notes))
        self.split, self.where = "+".join(part.split for part in parts), parts[0].where

    def __len__(self) -> int:
        return len(self._places)

    def names(self) -> list[str]:
        return list(self._names)

    def label(self, index: int) -> np.ndarray:
        part, place = self._places[index]
        return part.label(place)

    def __getitem__(self, index: int) -> Sample:
        part, place = self._places[index]
        return part[place]._replace(name=self._names[index])


def find_entry(name: str) -> Entry:
    if name not in DATASETS:
        raise ConfigError(f"data set {name!r} is not one of {', '.join(DATASETS)}" + nearest(name, DATASETS))
    return DATASETS[name]


def build_dataset(
    name: str,
    root: str | Path | None,
    split: str,
    *,
    num_classes: int | None = None,
    classes: str | Path | None = None,
    ignore_value: int | None = None,
    label_offset: int = 0,
    allow_outside_root: bool = False,
    seed: int = 0,
) -> SegmentationDataset:
    """A split of the data set ``name``, or several joined by ``+`` as in ``"train+train_extra"``.

    ``num_classes`` and ``classes`` (a file) give the classes of ``folder`` and ``list``, and ``classes`` those of
    ``coco``, if they are not VOC's. In the masks of a folder or list, ``ignore_value`` means what 255 does, and
    ``label_offset`` is added to other values. ``seed`` is for ``synthetic``. ``allow_outside_root`` lets a list of
    image files name files that are not below ``root``.

    Raises :class:`ConfigError` for an unknown name or split or a missing root, and :class:`DataError` for a root that
    is not laid out as ``DATASETS[name].tree`` shows.
    """
    entry = find_entry(name)
    folder_path = _root(name, entry, root)
    options: dict[str, Any] = {}
    if entry.free_classes:
        options = {"num_classes": num_classes, "classes": classes}
        options |= {"ignore_value": ignore_value, "label_offset": label_offset}
    elif entry.categories:
        options = {"classes": classes}
    elif classes is not None:
        raise ConfigError(f"--classes {classes}: data set {name!r} has its own classes; leave the option out")
    if not entry.free_classes and (ignore_value is not None or label_offset):
        raise ConfigError(
            f"--ignore-value and --label-offset: data set {name!r} has its own label values; leave the options out"
        )
    if entry.lists:
        options["allow_outside_root"] = allow_outside_root
    splits = split.split("+")
    for part in splits:
        if entry.splits and part not in entry.splits:
            known = ", ".join(entry.splits)
            raise ConfigError(f"data set {name!r} has no split {part!r}; it has {known}" + nearest(part, entry.splits))
    if len(set(splits)) < len(splits):
        raise ConfigError(f"split {split!r} names a part twice")
    if folder_path is None:
        parts = [entry.build(part, seed=seed) for part in splits]
    else:
        parts = [entry.build(folder_path, part, **options) for part in splits]
    if num_classes not in (None, parts[0].num_classes):
        raise ConfigError(
            f"--num-classes {num_classes}: data set {name!r} has {parts[0].num_classes}; leave the option out"
        )
    return parts[0] if len(parts) == 1 else JoinedDataset(parts)


def _root(name: str, entry: Entry, root: str | Path | None) -> Path | None:
    if not entry.needs_root:
        if root is not None:
            others = ", ".join(other for other, e in DATASETS.items() if e.needs_root)
            raise ConfigError(f"--root {root}: data set {name!r} has no files; leave the option out, or use {others}")
        return None
    layout = f"expected the folder of data set {name!r}:\n{textwrap.indent(entry.tree, '  ')}"
    if root is None:
        raise ConfigError(f"--root is missing; {layout}")
    path = Path(os.path.expanduser(root))
    if not os.path.isdir(path):
        raise ConfigError(f"--root {path}: no such folder; {layout}")
    return path
