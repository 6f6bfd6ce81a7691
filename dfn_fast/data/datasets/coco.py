"""COCO's instances as VOC classes: the images that VOC models are pre-trained on.

Nothing is written to disk, and ``pycocotools`` draws the masks: ``pip install pycocotools``::

    ROOT/
      annotations/instances_train2017.json  instances_val2017.json  (or of another year)
      train2017/000000000009.jpg ...        or images/train2017/
      val2017/000000000139.jpg ...

An annotation file ``instances_X.json`` makes split ``X``. Instances of the 20 VOC classes are drawn from the largest to
the smallest. Crowds of them are 255 where no single instance lies, and every other category is background. As for
DeepLab, an image is used only if it has a VOC class and more than 1,000 labelled pixels, which is the sum of the
instances' ``area`` without crowds.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from dfn_fast.data.base import IGNORE, Pair, Sample, SegmentationDataset
from dfn_fast.data.datasets.pairing import below, checked_pairs
from dfn_fast.data.datasets.voc import VOC_CLASSES, VocDataset
from dfn_fast.errors import ConfigError, DataError, nearest, shortened
from dfn_fast.files import require_regular
from dfn_fast.media.images import read_image

MIN_PIXELS = 1000
MAX_SIDE = 1 << 14  # of an image, in pixels
MAX_BYTES = 1 << 32  # of an annotation file
_COCO_NAMES = {  # where the name differs from VOC's
    "airplane": "aeroplane",
    "couch": "sofa",
    "dining table": "diningtable",
    "motorcycle": "motorbike",
    "potted plant": "pottedplant",
    "tv": "tvmonitor",
}


class CocoDataset(SegmentationDataset):
    """A split of COCO with VOC's classes, by the rules of this file's docstring; ``Pair.label`` is the JSON file."""

    name = "coco"
    classes = VOC_CLASSES
    palette = VocDataset.palette

    def __init__(self, root: str | Path, split: str, *, allow_outside_root: bool = False):
        _mask_module()
        root = Path(root)
        limit = None if allow_outside_root else root
        annotations = _annotation_file(root, split)
        folder = next((f for f in (root / split, root / "images" / split) if f.is_dir()), None)
        if folder is None:
            raise DataError(f"{root / split}: the folder of the images is missing, and so is {root / 'images' / split}")
        images = _read_instances(annotations)
        self._images = [json.dumps(image).encode() for image in images]  # text takes a fifth of the lists' memory
        try:
            files = [below(limit, folder / image["file"]) for image in images]
        except DataError as error:
            raise DataError(f"{annotations}: {error}") from None
        pairs = [Pair(file, annotations, file.stem) for file in files]
        super().__init__(checked_pairs(pairs, annotations), split, root)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        image = read_image(pair.image)
        label = _draw_label(json.loads(self._images[index]), pair.label)
        self.check_sample(image, label, pair)
        return Sample(image, label, pair.name)


def _draw_label(image: dict[str, Any], path: Path) -> np.ndarray:
    """The label ``[H, W]`` of an image ``{"file": name, "size": (H, W), "instances": [...]}``.

    An instance is (class id, crowd, area, segmentation), the last as in COCO's file; ``path`` is that file, for errors.
    """
    label = np.zeros(image["size"], np.uint8)
    for class_id, crowd, _, segmentation in sorted(image["instances"], key=lambda x: (not x[1], -x[2])):
        try:
            label[_decode(segmentation, *image["size"])] = IGNORE if crowd else class_id
        except Exception as error:  # pycocotools raises bare Exception, and anything for values that it cannot index
            raise DataError(f"{path}: image {image['file']}: a segmentation cannot be drawn ({error})") from error
    return label


def _decode(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Polygons, or a run-length code whose counts are a list or a string, as a mask ``[H, W]``.

    Raises ``ValueError`` for values that pycocotools would not check; its memory grows with a polygon's length.
    """
    masks = _mask_module()
    if not isinstance(segmentation, list) and list(segmentation["size"]) != [height, width]:
        raise ValueError(f"a run-length code for {segmentation['size']} in an image of {[height, width]}")
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]  # four numbers would be read as a box
        if any(not -MAX_SIDE <= x <= 2 * MAX_SIDE for polygon in polygons for x in polygon):
            raise ValueError("a polygon's corner lies far from the image")
        if not polygons:
            return np.zeros((height, width), bool)
        code = masks.merge(masks.frPyObjects(polygons, height, width))
    elif isinstance(segmentation["counts"], list):
        if min(segmentation["counts"]) < 0 or sum(segmentation["counts"]) != height * width:
            raise ValueError("the runs do not cover the image")
        code = masks.frPyObjects(segmentation, height, width)
    else:
        code = segmentation
    return masks.decode(code).astype(bool)


def _read_instances(path: Path) -> list[dict[str, Any]]:
    """The images of an annotation file that are used, each in the form that :func:`_draw_label` takes."""
    require_regular(path, DataError, "annotation file", MAX_BYTES)
    try:
        content = json.loads(path.read_bytes())
        names = {c["id"]: _COCO_NAMES.get(c["name"], c["name"]) for c in content["categories"]}
        class_ids = {i: VOC_CLASSES.index(name) for i, name in names.items() if name in VOC_CLASSES}
        instances = defaultdict(list)
        for a in content["annotations"]:
            if a["category_id"] in class_ids:
                crowd = bool(a.get("iscrowd", 0))
                instances[a["image_id"]].append((class_ids[a["category_id"]], crowd, a["area"], a["segmentation"]))
        return [
            {"file": str(i["file_name"]), "size": _size(i), "instances": instances[i["id"]]}
            for i in content["images"]
            if sum(area for _, crowd, area, _ in instances[i["id"]] if not crowd) > MIN_PIXELS
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise DataError(
            f"{path}: expected COCO's instances with images, annotations and categories "
            f"({type(error).__name__}: {shortened(str(error))}); unpack the annotations again"
        ) from error


def _size(image: dict[str, Any]) -> tuple[int, int]:
    """Height and width; raises ``ValueError`` for a size that no image has."""
    height, width = image["height"], image["width"]
    if not (isinstance(height, int) and isinstance(width, int) and 0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise ValueError(f"image {image['file_name']}: height {height}, width {width}")
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
