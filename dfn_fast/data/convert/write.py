"""Writes a data set of another form as images, index PNGs and classes.txt, in the layout of data set ``folder``."""

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dfn_fast.data.convert import coco, colour, cvat, labelme, yolo
from dfn_fast.data.convert.shapes import Annotations, Picture
from dfn_fast.data.datasets.classes import read_table
from dfn_fast.data.datasets.voc import voc_palette
from dfn_fast.data.orientation import orientation_of
from dfn_fast.errors import ConfigError, DataError, listed
from dfn_fast.media.images import read_image, write_image, write_label

FORMS = {"labelme": labelme.read, "coco": coco.read, "yolo": yolo.read, "cvat": cvat.read, "colour": colour.read}


class Converted(NamedTuple):
    """What was written."""

    classes: tuple[str, ...]
    splits: dict[str, int]  # images by split; the name is empty if there is none
    pixels: np.ndarray  # [256] int64: by class id
    images: np.ndarray  # [256] int64: how many images have each class id
    notes: list[str]


def convert(form: str, source: str | Path, target: str | Path, classes: str | Path | None = None) -> Converted:
    """Reads ``source`` in the form of that name, and writes ``target``, which must not exist or be empty.

    ``classes`` is a table of the classes that a shape may have. Nothing is written unless all of ``source`` can be
    read. Raises :class:`DataError` for what is wrong in it, and :class:`ConfigError` for a target that is taken.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise ConfigError(f"{source}: no such folder; give the one that holds the labels of form {form!r}")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder; name a new one")
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"{target}: its folder does not exist; create it first")
    table = None if classes is None else read_table(Path(classes))
    annotations = FORMS[form](source, table)
    splits = _splits(annotations.pictures, source)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name[:32]}-") as folder:
        written = Path(folder) / "data"
        written.mkdir()
        converted = _write(annotations, splits, written)
        if target.exists():
            target.rmdir()
        os.rename(written, target)
    return converted


def _splits(pictures: list[Picture], source: Path) -> dict[str, int]:
    """Images by split. Raises :class:`DataError` if only some have one, or if two would be one file."""
    if not pictures:
        raise DataError(f"{source}: no images there")
    splits = {split: [p for p in pictures if p.split == split] for split in dict.fromkeys(p.split for p in pictures)}
    if len(splits) > 1 and "" in splits:
        raise DataError(
            f"{source}: {len(splits[''])} images are in no split, such as {splits[''][0].image}, but others are in "
            f"{listed(split for split in splits if split)}; move them"
        )
    first: dict[tuple[str, str], Path] = {}
    for picture in pictures:
        if (other := first.setdefault((picture.split, picture.stem), picture.image)) is not picture.image:
            raise DataError(f"{picture.image} and {other} would both be {picture.stem!r} of {picture.split or 'all'}")
    return {split: len(those) for split, those in splits.items()}


def _write(annotations: Annotations, splits: dict[str, int], root: Path) -> Converted:
    names, notes = annotations.classes, list(annotations.notes)
    palette = voc_palette(len(names)) if annotations.palette is None else annotations.palette
    rows = [_quoted(name) for name in names]
    if annotations.palette is not None and len(np.unique(palette, axis=0)) == len(names):
        rows = [f"{row} {' '.join(map(str, colour))}" for row, colour in zip(rows, palette.tolist(), strict=True)]
    text = "".join(f"{row}\n" for row in rows)
    (root / "classes.txt").write_text(text, encoding="utf-8")
    if read_table(root / "classes.txt").names != names:
        raise DataError(f"classes {listed(names, 20)} cannot be written as a table of classes; rename them")
    pixels, images, turned = np.zeros(256, np.int64), np.zeros(256, np.int64), 0
    for picture in annotations.pictures:
        home = root / picture.split
        image, mask = home / "images" / f"{picture.stem}{picture.image.suffix}", home / "masks" / f"{picture.stem}.png"
        for path in (image, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        label = picture.label()
        if orientation_of(picture.image) > 1:
            write_image(image.with_name(mask.name), read_image(picture.image))
            turned += 1
        else:
            shutil.copyfile(picture.image, image)
        write_label(mask, label, palette)
        count = np.bincount(label.ravel(), minlength=256)
        pixels += count
        images += count > 0
    if turned:
        notes.append(f"{turned} images are saved upright, without the EXIF orientation that they had")
    return Converted(names, splits, pixels, images, notes)


def _quoted(name: str) -> str:
    """A name as a table of classes takes it, whatever it contains."""
    return name if re.fullmatch(r"[^\W\d]\w*", name) else '"' + name.replace('"', '""') + '"'
