"""COCO's JSON: categories, images and annotations with polygons or run-length codes."""

import json
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dfn_fast.data.base import IGNORE
from dfn_fast.data.convert import shapes
from dfn_fast.data.convert.shapes import BROKEN, Annotations, ClassIds, Picture, Problems
from dfn_fast.data.datasets.classes import ClassTable
from dfn_fast.data.datasets.coco import decode
from dfn_fast.data.datasets.layout import split_name
from dfn_fast.data.datasets.pairing import below, spellings
from dfn_fast.errors import DataError, brief, listed
from dfn_fast.files import require_regular

MAX_BYTES = 1 << 32  # of an annotation file


def read(source: Path, table: ClassTable | None) -> Annotations:
    """The annotation files in ``source``, its ``annotations`` and the folders of its splits.

    Without a table the classes are the categories in the order of their ids, which all files must share.
    """
    problems, contents = Problems(source), {}
    for path in sorted({*source.glob("*.json"), *source.glob("annotations/*.json"), *source.glob("*/*.coco.json")}):
        try:
            require_regular(path, DataError, "annotation file", MAX_BYTES)
            content = json.loads(path.read_bytes())
            contents[path] = content, _by_id(content["categories"], "category"), _by_id(content["images"], "image")
        except BROKEN as error:
            problems.append(
                f"{path}: expected COCO's images, annotations and categories ({type(error).__name__}: {error})"
            )
    problems.require_none()
    if not contents:
        raise DataError(f"{source}: no annotation file there, nor in annotations/, nor a *.coco.json in its folders")
    names = {path: [str(c["name"]) for c in categories.values()] for path, (_, categories, _) in contents.items()}
    first = next(iter(names))
    other = next((path for path in names if names[path] != names[first]), None)
    if other and table is None:
        raise DataError(
            f"{first} and {other} have other categories: {listed(names[first], 20)}, and {listed(names[other], 20)}; "
            "give the classes with --classes FILE"
        )
    ids = ClassIds(names[first], first) if table is None else ClassIds(table.names, table.source)
    pictures = []
    for path, (content, categories, images) in contents.items():
        of_image = defaultdict(list)
        for annotation in content["annotations"]:
            of_image[annotation["image_id"]].append(annotation)
        for image_id in of_image.keys() - images.keys():
            problems.append(f"{path}: annotation {of_image[image_id][0].get('id')}: no image {brief(image_id)}")
        for image_id, image in images.items():
            try:
                pictures.append(_picture(path, source, image, of_image[image_id], categories, ids, problems))
            except BROKEN as error:
                problems.append(f"{path}: image {brief(image.get('file_name'))}: {error}")
    problems.require_none()
    return Annotations(tuple(ids.classes), pictures, [])


def _by_id(items: list[dict[str, Any]], what: str) -> dict[Any, dict[str, Any]]:
    by_id = {item["id"]: item for item in sorted(items, key=lambda item: item["id"])}
    if len(by_id) < len(items):
        raise ValueError(f"an id of a {what} is there twice")
    return by_id


def _picture(
    path: Path,
    source: Path,
    image: dict[str, Any],
    annotations: list[dict[str, Any]],
    categories: dict[Any, dict[str, Any]],
    ids: ClassIds,
    problems: Problems,
) -> Picture:
    name = path.stem.removeprefix("instances_")
    folders = [path.parent, path.parent / "images", source / name, source / "images" / name, source / "images", source]
    candidates = [below(source, folder / spelling) for folder in folders for spelling in spellings(image["file_name"])]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise ValueError(f"it is in none of {listed(map(str, dict.fromkeys(folders)), 6)}")
    size = shapes.require_size(file, (image["height"], image["width"]))
    drawn = []
    for annotation in annotations:
        try:
            category = categories.get(annotation["category_id"])
            if category is None:
                raise ValueError(f"category {brief(annotation['category_id'])} is not in categories")
            class_id = ids[str(category["name"])]
            drawn.append((IGNORE if annotation.get("iscrowd") else class_id, _regions(annotation, size)))
        except BROKEN as error:
            problems.append(f"{path}: annotation {brief(annotation.get('id'))}: {error}")
    split, stem = shapes.place(PurePosixPath(file.relative_to(source).as_posix()))
    if not split and split_name(name) in shapes.SPLITS:
        split = split_name(name)
    return Picture(file, split, stem, shapes.drawing(size, drawn))


def _regions(annotation: dict[str, Any], size: tuple[int, int]) -> list[np.ndarray]:
    segmentation = annotation.get("segmentation")
    if not segmentation:
        raise ValueError("it has no segmentation, only a box; leave it out, or draw its outline")
    if isinstance(segmentation, list):
        return [shapes.polygon(numbers) for numbers in segmentation]
    return [decode(segmentation, *size)]
