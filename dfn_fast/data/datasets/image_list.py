"""Your own images from a list: a text file with ``image<TAB>label`` on each line.

Split ``train`` is train.txt in the root; a split ending in ``.txt`` is that file itself, in the root or anywhere::

    ROOT/
      train.txt    per line: photos/a.jpg<TAB>labels/a.png; blank lines and comments, which begin with #, are skipped
      val.txt
      classes.txt  one class per line: name, or name R G B

Paths are absolute, or relative to the list's folder or to root. One that leaves root is an error unless
``--allow-outside-root`` is given, because a list may come from anywhere. Labels hold class ids 0..254 (255: ignore), or
the colours in classes.txt.
``--classes FILE`` or ``--num-classes N`` replaces classes.txt.
"""

import itertools
import os
from pathlib import Path

from dfn_fast.data.base import Pair
from dfn_fast.data.datasets.classes import class_table
from dfn_fast.data.datasets.masks import MaskDataset, Numbering
from dfn_fast.data.datasets.pairing import PairingError, below, checked_pairs, entries, spellings
from dfn_fast.errors import ConfigError, DataError, nearest, shortened


class ListDataset(MaskDataset):
    """A list in the form of this file's docstring; an image's name is its path below root, without the suffix."""

    name = "list"

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        num_classes: int | None = None,
        classes: str | Path | None = None,
        allow_outside_root: bool = False,
        ignore_value: int | None = None,
        label_offset: int = 0,
    ):
        root = Path(root)
        limit = None if allow_outside_root else root
        list_file = _list_file(root, split)
        table = class_table([root], num_classes, classes)
        pairs, problems = [], []
        folders = list(dict.fromkeys((list_file.parent, root)))
        for number, line in entries(list_file, lambda line: bool(_find(line.split("\t")[0], folders, limit))):
            try:
                pairs.append(_pair(line, folders, limit, root))
            except DataError as error:
                problems.append(f"{list_file}:{number}: {error}")
        if problems:
            raise PairingError(list_file, problems)
        numbering = Numbering(ignore_value, label_offset)
        super().__init__(checked_pairs(pairs, list_file), split, list_file, table, numbering)


def _list_file(root: Path, split: str) -> Path:
    candidates = [root / split, Path(split)] if split.endswith(".txt") else [root / f"{split}.txt"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(file.stem for file in root.glob("*.txt") if file.name != "classes.txt")
    raise ConfigError(
        f"{candidates[0]}: this list does not exist; the root has {', '.join(known) or 'no .txt file'}"
        + nearest(split, known)
    )


def _pair(line: str, folders: list[Path], limit: Path | None, root: Path) -> Pair:
    fields = [field.strip() for field in line.split("\t")]
    if len(fields) != 2:
        raise DataError(f"expected image<TAB>label, got {shortened(line)!r}")
    image, label = (_find(field, folders, limit) for field in fields)
    return Pair(image, label, _name(image, root))


def _find(field: str, folders: list[Path], limit: Path | None) -> Path:
    """The listed file in the first of ``folders`` that has it."""
    refused: DataError | None = None
    for folder, spelling in itertools.product(folders, spellings(field)):
        try:
            path = below(limit, folder / spelling)
        except DataError as error:
            refused = refused or error
        else:
            if os.path.isfile(path):
                return path
    if refused is not None:
        raise refused
    raise DataError(f"{shortened(field)} does not exist in {', nor in '.join(map(str, folders))}")


def _name(image: Path, root: Path) -> str:
    """The path without suffix, relative to root, or to the file system's root if it lies elsewhere: safe for output."""
    image = Path(os.path.splitext(os.path.abspath(image))[0])
    root = Path(os.path.abspath(root))
    return image.relative_to(root if image.is_relative_to(root) else image.anchor).as_posix()
