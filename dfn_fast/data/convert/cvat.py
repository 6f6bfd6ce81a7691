"""CVAT for images 1.1: one XML file with the shapes of all images."""

import itertools
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np

from dfn_fast.data.convert import shapes
from dfn_fast.data.convert.shapes import BROKEN, Annotations, ClassIds, Picture, Problems
from dfn_fast.data.datasets.classes import ClassTable
from dfn_fast.data.datasets.layout import split_name
from dfn_fast.data.datasets.pairing import below, spellings
from dfn_fast.errors import DataError, brief
from dfn_fast.files import MAX_TEXT, require_regular


def read(source: Path, table: ClassTable | None) -> Annotations:
    """``annotations.xml`` in ``source``; without a table the classes are its labels in their order."""
    path = source / "annotations.xml"
    if not path.is_file():
        raise DataError(f"{path}: this file is missing; unpack CVAT's export 'CVAT for images 1.1' there")
    require_regular(path, DataError, "annotation file", MAX_TEXT)
    content = path.read_bytes()
    try:
        if b"<!DOCTYPE" in content or b"<!ENTITY" in content:  # which may stand for gigabytes
            raise ValueError("a document type, which CVAT does not write")
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path}: expected CVAT's XML ({error})") from error
    names = [label.findtext("name", "") for label in root.iterfind("meta//labels/label")]
    if table is None and not names:
        raise DataError(f"{path}: it names no labels; give the classes with --classes FILE")
    ids = ClassIds(names, path) if table is None else ClassIds(table.names, table.source)
    problems, pictures = Problems(source), []
    for image in root.iterfind("image"):
        try:
            pictures.append(_picture(path, image, ids, problems))
        except BROKEN as error:
            problems.append(f"{path}: image {brief(image.get('name'))}: {error}")
    if root.find("track") is not None:
        problems.append(f"{path}: tracks of a video; export the task as 'CVAT for images 1.1'")
    problems.require_none()
    return Annotations(tuple(ids.classes), pictures, [])


def _picture(path: Path, image: ElementTree.Element, ids: ClassIds, problems: Problems) -> Picture:
    source, name = path.parent, image.attrib["name"]
    candidates = [below(source, source / folder / s) for folder in ("images", "") for s in spellings(name)]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise ValueError(f"it is neither in {source / 'images'} nor in {source}; export with the images")
    size = shapes.require_size(file, (int(image.attrib["height"]), int(image.attrib["width"])))
    drawn = []
    for number, shape in enumerate(sorted(image, key=_z_order), 1):
        try:
            drawn.append((ids[shape.attrib["label"]], [_region(shape, size)]))
        except BROKEN as error:
            problems.append(f"{path}: image {name}: shape {number} ({brief(shape.get('label'))}): {error}")
    split, stem = shapes.place(PurePosixPath(file.relative_to(source).as_posix()))
    subset = split_name(image.get("subset", ""))
    return Picture(file, split or (subset if subset in shapes.SPLITS else ""), stem, shapes.drawing(size, drawn))


def _z_order(shape: ElementTree.Element) -> int:
    return int(shape.get("z_order", 0))


def _region(shape: ElementTree.Element, size: tuple[int, int]) -> np.ndarray:
    def number(name: str) -> float:
        return float(shape.attrib[name])

    if shape.tag == "polygon":
        return shapes.polygon(n for point in shape.attrib["points"].split(";") for n in point.split(","))
    if shape.tag == "box" and float(shape.get("rotation", 0)) == 0:
        return shapes.box(number("xtl"), number("ytl"), number("xbr"), number("ybr"))
    if shape.tag == "ellipse":
        turned = float(shape.get("rotation", 0))
        return shapes.ellipse(number("cx"), number("cy"), number("rx"), number("ry"), turned)
    if shape.tag == "mask":
        return _mask(shape, size)
    kind = f"a turned {shape.tag}" if shape.tag == "box" else f"kind {brief(shape.tag)}"
    raise ValueError(f"{kind} is not read; expected polygon, box, ellipse, mask")


def _mask(shape: ElementTree.Element, size: tuple[int, int]) -> np.ndarray:
    """The pixels of a run-length code: runs of 0 and 1 in turn, row by row, in a box."""
    left, top, width, height = (int(shape.attrib[name]) for name in ("left", "top", "width", "height"))
    runs = [int(run) for run in shape.attrib["rle"].split(",")]
    inside = 0 <= left <= left + width <= size[1] and 0 <= top <= top + height <= size[0]
    if not inside or min(runs) < 0 or sum(runs) != width * height:
        raise ValueError("the runs of this mask do not fill its box, or the box leaves the image")
    region = np.zeros(size, bool)
    bits = np.repeat(np.array([i % 2 for i, _ in zip(itertools.count(), runs, strict=False)], bool), runs)
    region[top : top + height, left : left + width] = bits.reshape(height, width)
    return region
