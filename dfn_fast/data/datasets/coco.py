"""COCO's instances as VOC classes, the images that VOC models are pre-trained on; or your own categories.

Nothing is written to disk, and ``pycocotools`` draws the masks: ``pip install pycocotools``::

    ROOT/
      annotations/instances_train2017.json  instances_val2017.json  (or of another year)
      train2017/000000000009.jpg ...        or images/train2017/
      val2017/000000000139.jpg ...

An annotation file ``instances_X.json`` makes split ``X``. Instances of the 20 VOC classes are drawn from the largest to
the smallest. Crowds of them are 255 where no single instance lies. Every other category is background, which a note
says. As for DeepLab, an image is used only if it has a VOC class and more than 1,000 labelled pixels, which is the sum
of the instances' ``area`` without crowds.

If none of a file's categories is VOC's, all of them are classes in the order of their ids, after class 0, background.
``--classes FILE`` chooses among categories by name, as classes.txt of a folder does; its first class is the background.
In both cases all images are used.
"""

import contextlib
import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dfn_fast.data.base import IGNORE, Pair, SegmentationDataset
from dfn_fast.data.datasets.classes import ClassTable, read_table, require_name
from dfn_fast.data.datasets.pairing import below, checked_pairs
from dfn_fast.data.datasets.voc import VOC_CLASSES, VocDataset, voc_palette
from dfn_fast.errors import ConfigError, DataError, brief, listed, nearest, shortened
from dfn_fast.files import require_regular
from dfn_fast.media.images import open_image

MIN_PIXELS = 1000
MAX_SIDE = 1 << 14  # of an image, in pixels
MAX_BYTES = 1 << 32  # of an annotation file
MAX_OUTLINE = 1 << 21  # of an instance, in pixels: pycocotools takes about 100 bytes for each
_BACKGROUND = "background"
_BROKEN = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, OSError, RecursionError)  # by the content
_COCO_NAMES = {  # where the name differs from VOC's
    "airplane": "aeroplane",
    "couch": "sofa",
    "dining table": "diningtable",
    "motorcycle": "motorbike",
    "potted plant": "pottedplant",
    "tv": "tvmonitor",
}


class CocoDataset(SegmentationDataset):
    """A split of COCO by the rules of this file's docstring; ``Pair.label`` is the JSON file."""

    name = "coco"
    classes: tuple[str, ...] = VOC_CLASSES
    palette = VocDataset.palette

    def __init__(
        self, root: str | Path, split: str, *, classes: str | Path | None = None, allow_outside_root: bool = False
    ):
        _mask_module()
        root = Path(root)
        limit = None if allow_outside_root else root
        annotations = _annotation_file(root, split)
        folder = next((f for f in (root / split, root / "images" / split) if f.is_dir()), None)
        if folder is None:
            raise DataError(f"{root / split}: the folder of the images is missing, and so is {root / 'images' / split}")
        table = None if classes is None else read_table(Path(classes))
        images, mapping, notes = _read_instances(annotations, table)
        self.classes, self.palette = mapping.table.names, mapping.table.palette
        self._images = [json.dumps(image).encode() for image in images]  # text takes a fifth of the lists' memory
        try:
            files = [below(limit, folder / image["file"]) for image in images]
        except DataError as error:
            raise DataError(f"{annotations}: {error}") from None
        pairs = [Pair(file, annotations, file.stem) for file in files]
        super().__init__(checked_pairs(pairs, annotations), split, root, notes)

    def label(self, index: int) -> np.ndarray:
        pair, image = self.pairs[index], json.loads(self._images[index])
        with open_image(pair.image) as file:  # before memory is taken for a size that the image may not have
            swapped = image["size"] == list(file.size)  # by an EXIF orientation
            self.check_size(file.size if swapped else file.size[::-1], tuple(image["size"]), pair)
        return _draw_label(image, pair.label)

    def label_orientation(self, index: int) -> int:
        return 1  # it is drawn


def _draw_label(image: dict[str, Any], path: Path) -> np.ndarray:
    """The label ``[H, W]`` of an image ``{"file": name, "size": (H, W), "instances": [...]}``.

    An instance is (class id, crowd, area, segmentation), the last as in COCO's file; ``path`` is that file, for errors.
    """
    label = np.zeros(image["size"], np.uint8)
    for class_id, crowd, _, segmentation in sorted(image["instances"], key=lambda x: (not x[1], -x[2])):
        try:
            label[decode(segmentation, *image["size"])] = IGNORE if crowd else class_id
        except Exception as error:  # pycocotools raises bare Exception, and anything for values that it cannot index
            raise DataError(f"{path}: image {image['file']}: a segmentation cannot be drawn ({error})") from error
    return label


def decode(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Polygons, or a run-length code whose counts are a list or a string, as a mask ``[H, W]``.

    Raises ``ValueError`` for values that pycocotools would not check; its memory grows with a polygon's length.
    """
    masks = _mask_module()
    if not isinstance(segmentation, list) and list(segmentation["size"]) != [height, width]:
        raise ValueError(f"a run-length code for {segmentation['size']} in an image of {[height, width]}")
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]  # four numbers would be read as a box
        if sum(map(_outline, polygons)) > MAX_OUTLINE:
            raise ValueError(f"an outline of more than {MAX_OUTLINE} pixels")
        if not polygons:
            return np.zeros((height, width), bool)
        code = masks.merge(masks.frPyObjects(polygons, height, width))
    elif isinstance(segmentation["counts"], list):
        runs = segmentation["counts"]
        if not all(type(run) is int and run >= 0 for run in runs) or sum(runs) != height * width:
            raise ValueError("the runs do not cover the image")
        code = masks.frPyObjects(segmentation, height, width)
    else:
        code = segmentation
    return masks.decode(code).astype(bool)


def _outline(polygon: list[float]) -> float:
    """The length of a polygon in pixels; raises ``ValueError`` for one that no image has."""
    corners = np.array(polygon, np.float64).reshape(-1, 2)
    if not ((corners >= -MAX_SIDE) & (corners <= 2 * MAX_SIDE)).all():
        raise ValueError("a polygon's corner lies far from the image")
    return float(np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum())


class _Mapping(NamedTuple):
    """Which categories are which classes."""

    table: ClassTable
    ids: dict[str, int]  # by a category's name
    min_pixels: int  # that an image must have more of, to be used; -1: all images are used
    notes: list[str]


def _mapping(names: list[str], path: Path, table: ClassTable | None) -> _Mapping:
    """The classes in ``table`` if it is given, else VOC's if any category is one of them, else the categories."""
    voc = {name: VOC_CLASSES.index(_COCO_NAMES.get(name, name)) for name in names if _is_voc(name)}
    if table is None and voc:
        return _Mapping(ClassTable(VOC_CLASSES, VocDataset.palette, {}, "PASCAL VOC"), voc, MIN_PIXELS, [])
    if table is None:
        classes = [_BACKGROUND]
        for name in names:
            if name != _BACKGROUND:
                require_name(name, classes, f"{path}: categories")
                classes.append(name)
        if not 2 <= len(classes) <= IGNORE:
            raise DataError(f"{path}: expected 1..{IGNORE - 1} categories besides background, got {len(classes) - 1}")
        ids = {name: i for i, name in enumerate(classes)}
        note = f"the classes are {_BACKGROUND} and the categories of {path.name}, as none of them is VOC's"
        return _Mapping(ClassTable(tuple(classes), voc_palette(len(classes)), {}, str(path)), ids, -1, [note])
    ids = {name: i for i, name in enumerate(table.names)}
    first, absent = table.names[0], [name for name in table.names[1:] if name not in names]
    if first in names and first.strip("_").casefold() != _BACKGROUND:
        raise ConfigError(
            f"{table.source}: its first class, {first!r}, is a category of {path}; write {_BACKGROUND} above it, for "
            "the pixels outside of all instances"
        )
    if len(absent) == len(table.names) - 1:
        raise DataError(
            f"{path}: none of its categories, {listed(names, 20)}, is a class of {table.source}: {listed(absent, 20)}"
        )
    notes = [f"the classes are those of {table.source}, by the names of the categories"]
    if absent:
        notes.append(f"classes that are no category of {path.name}: {listed(absent, 80)}")
    return _Mapping(table, ids, -1, notes)


def _is_voc(name: str) -> bool:
    return _COCO_NAMES.get(name, name) in VOC_CLASSES[1:]


def _names(content: dict[str, Any]) -> dict[Any, str]:
    """The names of the categories by their ids, in the order of these."""
    return {i: str(category["name"]) for i, category in sorted(_by_id(content["categories"], "category").items())}


def _require_same_categories(path: Path, names: list[str]) -> None:
    """Raises :class:`DataError` if another split's annotation file has other categories, and so other class ids."""
    for other in sorted(path.parent.glob("instances_*.json")):
        require_regular(other, DataError, "annotation file", MAX_BYTES)
        theirs = names
        with contextlib.suppress(*_BROKEN):  # whoever reads that split says so
            theirs = list(_names(json.loads(other.read_bytes())).values())
        if theirs != names:
            raise DataError(
                f"{path} and {other} have other categories: {listed(names, 20)}, and {listed(theirs, 20)}; a class id "
                "would mean two classes. Give the classes with --classes FILE"
            )


def _read_instances(path: Path, table: ClassTable | None) -> tuple[list[dict[str, Any]], _Mapping, list[str]]:
    """The images of an annotation file, in the form that :func:`_draw_label` takes, its classes, and notes."""
    require_regular(path, DataError, "annotation file", MAX_BYTES)
    try:
        content = json.loads(path.read_bytes())
        names = _names(content)
        mapping = _mapping(list(names.values()), path, table)
        images = _by_id(content["images"], "image")
        instances = defaultdict(list)
        others: Counter[str] = Counter()
        strays = 0
        for a in content["annotations"]:
            if a["category_id"] not in names:
                raise ValueError(f"an annotation of category {a['category_id']}, which is not in categories")
            name = names[a["category_id"]]
            strays += a["image_id"] not in images
            if name in mapping.ids:
                instances[a["image_id"]].append((mapping.ids[name], _crowd(a), _area(a), a["segmentation"]))
            else:
                others[name] += 1
        used = [
            {"file": _file_name(image), "size": _size(image), "instances": instances.get(i, [])}
            for i, image in images.items()
            if sum(area for _, crowd, area, _ in instances.get(i, []) if not crowd) > mapping.min_pixels
        ]
    except _BROKEN as error:
        raise DataError(
            f"{path}: expected COCO's instances with images, annotations and categories "
            f"({type(error).__name__}: {shortened(str(error))}); unpack the annotations again"
        ) from error
    if table is None and others and not instances:
        raise DataError(
            f"{path}: none of its categories is a class of VOC, which data set 'coco' reads: {listed(others, 20)}. "
            "Give your classes with --classes FILE, or draw masks, and read these with --data folder"
        )
    if table is None and mapping.min_pixels < 0:
        _require_same_categories(path, list(names.values()))
    notes = list(mapping.notes)
    if others:
        whose = "VOC's" if table is None else f"in {table.source}"
        notes.append(
            f"{sum(others.values())} instances of {len(others)} categories that are not {whose} are background: "
            f"{listed(sorted(others), 80)}"
        )
    if len(used) < len(images):
        notes.append(
            f"{len(images) - len(used)} of {len(images)} images are left out, having no class of VOC or at most "
            f"{MIN_PIXELS} labelled pixels"
        )
    if strays:
        notes.append(f"{strays} annotations are of images that are not in {path.name}, and are left out")
    return used, mapping, notes


def _by_id(items: list[dict[str, Any]], what: str) -> dict[Any, dict[str, Any]]:
    by_id: dict[Any, dict[str, Any]] = {}
    for item in items:
        if by_id.setdefault(item["id"], item) is not item:
            raise ValueError(f"{what} {item['id']} is there twice")
    return by_id


def _area(annotation: dict[str, Any]) -> float:
    area = annotation["area"]
    if isinstance(area, bool) or not 0 <= area < math.inf:
        raise ValueError(f"an area of {brief(area)}")
    return area


def _crowd(annotation: dict[str, Any]) -> bool:
    crowd = annotation.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise ValueError(f"iscrowd {brief(crowd)}")
    return bool(crowd)


def _file_name(image: dict[str, Any]) -> str:
    if not isinstance(image["file_name"], str):
        raise ValueError(f"file_name {brief(image['file_name'])}")
    return image["file_name"]


def _size(image: dict[str, Any]) -> tuple[int, int]:
    """Height and width; raises ``ValueError`` for a size that no image has."""
    height, width = image["height"], image["width"]
    if not all(type(side) is int and 0 < side <= MAX_SIDE for side in (height, width)):
        raise ValueError(f"image {image['file_name']}: height {brief(height)}, width {brief(width)}")
    return height, width


def _annotation_file(root: Path, split: str) -> Path:
    known = sorted(file.stem.removeprefix("instances_") for file in (root / "annotations").glob("instances_*.json"))
    if not known:
        raise DataError(f"{root / 'annotations'}: no instances_*.json there; unpack COCO's annotations into the root")
    if split not in known:
        raise ConfigError(f"{root}: coco has no split {split!r}; it has {', '.join(known)}" + nearest(split, known))
    return root / "annotations" / f"instances_{split}.json"


def _mask_module():
    try:
        from pycocotools import mask
    except ImportError:
        raise ConfigError("data set 'coco' needs pycocotools: pip install pycocotools") from None
    return mask
