"""YOLO's segments: for each image a text file, on each line a class and the corners of its outline as shares of 1."""

import os
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dfn_fast.data.convert import shapes
from dfn_fast.data.convert.shapes import BROKEN, Annotations, ClassIds, Picture, Problems
from dfn_fast.data.datasets.classes import TABLES, ClassTable, class_table
from dfn_fast.errors import ConfigError, DataError, brief, listed
from dfn_fast.files import MAX_TEXT, require_regular
from dfn_fast.media.listing import find_images, read_lines


def read(source: Path, table: ClassTable | None) -> Annotations:
    """The images below ``source``; labels lie beside them, or in ``labels`` where their path has ``images``.

    An image without a label file is background.
    """
    names, where = _names(source) if table is None else (list(table.names), table.source)
    ids = ClassIds(names, where)
    problems, pictures, unlabelled = Problems(source), [], []
    found = find_images(source, nested=True)
    texts: set[Path] = set()
    for image in found.files.values():
        try:
            label = _label_file(image, source)
            texts.add(label)
            size = shapes.upright_size(image)
            if not label.is_file():
                unlabelled.append(image)
            drawn = _read(label, names, ids, size, problems) if label.is_file() else []
            split, stem = shapes.place(PurePosixPath(image.relative_to(source).as_posix()))
            pictures.append(Picture(image, split, stem, shapes.drawing(size, drawn)))
        except BROKEN as error:
            problems.append(str(error))
    for path in found.passed_over:
        if path.suffix == ".txt" and path not in texts and path.parent != source:
            problems.append(f"{path}: no image belongs to these outlines")
    problems.require_none()
    notes = [f"the classes are background and those of {where}"]
    if unlabelled:
        notes.append(f"{len(unlabelled)} images have no label file and are background: {listed(map(str, unlabelled))}")
    return Annotations(tuple(ids.classes), pictures, notes)


def _label_file(image: Path, source: Path) -> Path:
    parts = list(image.relative_to(source).parent.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return source.joinpath(*parts, os.path.splitext(image.name)[0] + ".txt")


def _read(
    path: Path, names: list[str], ids: ClassIds, size: tuple[int, int], problems: Problems
) -> list[tuple[int, list[np.ndarray]]]:
    drawn = []
    for number, line in read_lines(path):
        try:
            first, *numbers = line.split()
            if not first.isdecimal() or int(first) >= len(names):
                raise ValueError(f"class {brief(first)} is none of 0..{len(names) - 1} in {ids.source}")
            if len(numbers) == 4:
                raise ValueError("this is a box, not an outline; label with segments")
            shares = [float(value) for value in numbers]
            if not all(0 <= value <= 1 for value in shares):
                raise ValueError(f"expected corners as shares 0..1 of width and height, got {brief(line)}")
            corners = shapes.polygon(v * size[1 - i % 2] for i, v in enumerate(shares))
            drawn.append((ids[names[int(first)]], [corners]))
        except BROKEN as error:
            problems.append(f"{path}:{number}: {error}")
    return drawn


def _names(source: Path) -> tuple[list[str], str | Path]:
    """The names of classes in data.yaml, or else in a table of classes."""
    files = [path for path in sorted(source.glob("*.y*ml")) if path.suffix in (".yaml", ".yml")]
    if not files:
        if not any((source / name).exists() for name in TABLES):
            raise ConfigError(f"{source}: no data.yaml and no classes.txt there; give the classes with --classes FILE")
        table = class_table([source], None, None)
        return list(table.names), table.source
    try:
        import yaml
    except ImportError:
        raise ConfigError(
            f"{files[0]}: reading it needs PyYAML (pip install pyyaml); or give the classes with --classes FILE"
        ) from None
    require_regular(files[0], DataError, "description of the data set", MAX_TEXT)
    try:
        names: Any = yaml.safe_load(files[0].read_text(encoding="utf-8"))["names"]
        if isinstance(names, dict):
            names = [names[i] for i in range(len(names))]
        return [str(name) for name in names], files[0]
    except (yaml.YAMLError, *BROKEN) as error:
        raise DataError(f"{files[0]}: expected YOLO's names, a list or one by id ({type(error).__name__})") from error
