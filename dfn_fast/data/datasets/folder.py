"""Your own images: a folder of images and a folder of masks.

``folder`` pairs images and masks by their path below ``images`` and ``masks``, without the suffix::

    ROOT/
      images/a.jpg  images/night/b.png ...
      masks/a.png   masks/night/b.png ...   class ids 0..254 in one 8-bit channel or a palette; 255: ignore
      classes.txt                           one class per line: name, or name R G B

A split that you made is kept: ``ROOT/images/{train,val}``, ``ROOT/train/{images,masks}``, or lists of images
``ROOT/{train,val}.txt``; valid and validation mean val. Without one, val is about every fifth image, chosen by a hash
of that path: the same on every machine, whatever other images there are. If there are folders below images, val is
some of them, because images of one folder are often alike. ``--classes FILE`` or ``--num-classes N`` replaces
classes.txt.
"""

from pathlib import Path

import numpy as np

from dfn_fast.data.base import IGNORE, SegmentationDataset
from dfn_fast.data.datasets.layout import find_part
from dfn_fast.data.datasets.layout import held_out as held_out
from dfn_fast.data.datasets.pairing import pair_by_stem
from dfn_fast.data.datasets.voc import voc_palette
from dfn_fast.errors import ConfigError, DataError, brief
from dfn_fast.files import MAX_TEXT, require_regular

MAX_NAME = 200  # characters of a class's name


class FolderDataset(SegmentationDataset):
    """A split of the layout in this file's docstring."""

    name = "folder"

    def __init__(
        self, root: str | Path, split: str, *, num_classes: int | None = None, classes: str | Path | None = None
    ):
        root = Path(root)
        part = find_part(root, split)
        pairs = pair_by_stem(part.images.files, part.masks.files, part.home)
        pairs = [pair for pair in pairs if pair.name in part.stems]
        self.classes, self.palette = class_table(root, num_classes, classes)
        super().__init__(pairs, split, part.home, part.notes)


def class_table(root: Path, num_classes: int | None, classes: str | Path | None) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and palette from the file ``classes``, else from ``root/classes.txt``, else ``num_classes`` numbers."""
    if classes is None and not (root / "classes.txt").is_file():
        if num_classes is None:
            raise ConfigError(
                f"{root / 'classes.txt'}: this file is missing, so the classes are not known; "
                "write one name per line, or give --num-classes or --classes"
            )
        if not 2 <= num_classes <= IGNORE:
            raise ConfigError(f"--num-classes {num_classes}: expected 2..{IGNORE}")
        return tuple(f"class {i}" for i in range(num_classes)), voc_palette(num_classes)
    path = Path(classes) if classes is not None else root / "classes.txt"
    names, palette = read_classes(path)
    if num_classes not in (None, len(names)):
        raise ConfigError(f"--num-classes {num_classes}: {path} has {len(names)} classes; leave out one of the two")
    return names, palette


def read_classes(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """The names and ``[K, 3]`` RGB uint8 palette of a classes file; a line without a colour gets VOC's."""
    require_regular(path, ConfigError, "table of classes", MAX_TEXT)
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a text file with one class per line ({error})") from error
    if not 2 <= len(lines) <= IGNORE:
        raise ConfigError(f"{path}: expected 2..{IGNORE} classes, one per line, got {len(lines)}")
    names: list[str] = []
    palette = voc_palette(len(lines))
    for i, line in enumerate(lines):
        name, *colour = line.strip().rsplit(maxsplit=3) or [""]
        if len(colour) != 3 or not all(value.isdecimal() for value in colour):
            name, colour = line.strip(), []
        if not 0 < len(name) <= MAX_NAME:
            got = "an empty line" if not name else f"{len(name)} characters"
            raise DataError(f"{path}:{i + 1}: expected a class name, or name R G B, got {got}")
        if name in names:
            raise DataError(f"{path}:{i + 1}: class {name!r} occurs twice")
        if any(len(value) > 9 or int(value) > 255 for value in colour):
            raise DataError(f"{path}:{i + 1}: expected a colour of 0..255, got {brief(' '.join(colour))}")
        if colour:
            palette[i] = [int(value) for value in colour]
        names.append(name)
    return tuple(names), palette
