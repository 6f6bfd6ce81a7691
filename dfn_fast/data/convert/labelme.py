"""LabelMe: a JSON file beside each image, with its shapes."""

import json
import math
from pathlib import Path, PurePosixPath
from typing import Any

from dfn_fast.data.convert import shapes
from dfn_fast.data.convert.shapes import BROKEN, Annotations, ClassIds, Picture, Problems
from dfn_fast.data.datasets.classes import ClassTable
from dfn_fast.data.datasets.pairing import below, spellings
from dfn_fast.errors import DataError, brief
from dfn_fast.files import MAX_TEXT, require_regular


def read(source: Path, table: ClassTable | None) -> Annotations:
    """The JSON files below ``source``. Without a table the classes are the labels of all shapes, sorted by name."""
    problems, contents = Problems(source), {}
    for path in sorted(source.rglob("*.json")):
        try:
            require_regular(path, DataError, "annotation file", MAX_TEXT)
            contents[path] = json.loads(path.read_bytes())
            names = {shape["label"] for shape in contents[path]["shapes"]}
            if not all(isinstance(name, str) for name in names):
                raise ValueError(f"labels {brief(names)}")
        except BROKEN as error:
            problems.append(f"{path}: expected LabelMe's JSON with shapes ({type(error).__name__}: {error})")
    problems.require_none()
    if not contents:
        raise DataError(f"{source}: no .json file there; give the folder in which LabelMe saved its files")
    found = {shape["label"] for content in contents.values() for shape in content["shapes"]}
    ids = ClassIds(sorted(found), source) if table is None else ClassIds(table.names, table.source)
    pictures = []
    for path, content in contents.items():
        try:
            pictures.append(_picture(path, content, source, ids, problems))
        except BROKEN as error:
            problems.append(f"{path}: {error}")
    problems.require_none()
    notes = [] if table else ["the classes are background and the labels of all shapes, sorted by name"]
    return Annotations(tuple(ids.classes), pictures, notes)


def _picture(path: Path, content: dict[str, Any], source: Path, ids: ClassIds, problems: Problems) -> Picture:
    listed = str(content["imagePath"])
    candidates = [below(source, path.parent / spelling) for spelling in spellings(listed)]
    image = next((candidate for candidate in candidates if candidate.is_file()), None)
    if image is None:
        raise ValueError(f"image {brief(listed)} is not there; put it beside this file")
    size = shapes.require_size(image, (content["imageHeight"], content["imageWidth"]))
    drawn = []
    for number, shape in enumerate(content["shapes"], 1):
        try:
            drawn.append((ids[shape["label"]], [_region(shape)]))
        except BROKEN as error:
            problems.append(f"{path}: shape {number}: {error}")
    split, stem = shapes.place(PurePosixPath(image.relative_to(source).as_posix()))
    return Picture(image, split, stem, shapes.drawing(size, drawn))


def _region(shape: dict[str, Any]) -> shapes.Region:
    kind, points = shape.get("shape_type", "polygon"), shape["points"]
    if kind == "polygon":
        return shapes.polygon(number for x, y in points for number in (x, y))
    if kind == "rectangle":
        (left, top), (right, bottom) = (points[0], points[len(points) // 2])  # newer files have all four corners
        return shapes.box(left, top, right, bottom)
    if kind == "circle":
        (x, y), (on_x, on_y) = points
        radius = math.hypot(on_x - x, on_y - y)
        return shapes.ellipse(x, y, radius, radius)
    raise ValueError(f"kind {brief(kind)} of class {brief(shape['label'])}; expected polygon, rectangle or circle")
