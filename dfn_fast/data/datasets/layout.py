"""Which images of data set ``folder`` belong to a split: as the user chose, or else by a hash."""

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dfn_fast.data.base import require_folder
from dfn_fast.data.datasets.endings import without_ending
from dfn_fast.data.datasets.pairing import PairingError, entries, spellings
from dfn_fast.errors import ConfigError, DataError, listed, nearest, shortened
from dfn_fast.media.listing import Found, composed, find_images

VAL_SHARE = 5
_SPLITS = ("train", "val", "test")
# Names of folders and lists, in any case: train, training, train2017, train_set, ...
_NAME = re.compile(r"(train|val|test)(?:ing|id|idation)?(?:[-_ ]?(?:set|data|split|images|\d+))?")


class Part(NamedTuple):
    """The files of one split."""

    images: Found
    masks: Found
    stems: set[str]  # of its pairs; the files may be those of other splits too
    home: Path  # the folder of images/ and masks/
    homes: list[Path]  # those of all splits
    samples: list[Path]  # a mask of each split
    notes: list[str]


def find_part(root: Path, split: str) -> Part:
    """The files of ``split``, which may be called by any of its names: val, valid or validation.

    Raises :class:`ConfigError` if there is no such split, and :class:`DataError` for contradicting folders.
    """
    beside = sorted(f.parent for f in root.glob("*/images") if f.is_dir() and not f.parent.name.startswith("."))
    lists = _lists(root)
    in_root = (root / "images").is_dir() and (not beside or any(find_images(root / "images", nested=True).files))
    if not in_root and beside:
        part = _from_split_folder(root, beside, split)
        notes = [f"{listed(map(str, lists.values()))}: passed over, the split is by folders"] if lists else []
        return part._replace(notes=part.notes + notes)
    rivals = [folder for folder in beside if split_name(folder.name) in ("train", "val")]
    if rivals:
        raise DataError(
            f"{root / 'images'} and {listed(str(f / 'images') for f in rivals)} both hold images; "
            "keep one of the two, as it is not clear which is the data set"
        )
    if asked := [folder for folder in beside if split_name(folder.name) == split_name(split)]:
        return _from_split_folder(root, asked, split)
    part = _from_one_folder(root, lists, split)
    others = [f"{listed(str(f / 'images') for f in beside)}: passed over, {root / 'images'} is the data set"]
    return part._replace(notes=part.notes + (others if beside else []))


def split_name(name: str) -> str:
    """``train``, ``val`` or ``test`` for each of its names, and other names unchanged."""
    match = _NAME.fullmatch(name.casefold())
    return match[1] if match else name


def held_out(stems: Iterable[str]) -> set[str]:
    """The stems that belong to val: with a SHA-256 (first 8 bytes) divisible by 5, else the one with the lowest."""
    hashes = {stem: int.from_bytes(hashlib.sha256(os.fsencode(stem)).digest()[:8], "big") for stem in stems}
    chosen = {stem for stem, value in hashes.items() if value % VAL_SHARE == 0}
    return chosen or set(sorted(hashes, key=hashes.__getitem__)[:1])


def held_out_folders(sizes: Mapping[str, int]) -> set[str]:
    """The folders that belong to val, chosen like stems; if they hold most of the images, only the smallest folder."""
    chosen = held_out(sizes)
    if 2 * sum(sizes[folder] for folder in chosen) <= sum(sizes.values()):
        return chosen
    return {min(sizes, key=lambda folder: (sizes[folder], folder))}


def _from_split_folder(root: Path, folders: list[Path], split: str) -> Part:
    """``SPLIT/images`` and ``SPLIT/masks``."""
    exact = [folder for folder in folders if folder.name == split != split_name(split)]
    found = exact or [folder for folder in folders if split_name(folder.name) == split_name(split)]
    if len(found) > 1:
        raise DataError(f"{' and '.join(map(str, found))} are the same split by their names; keep one of them")
    if not found:
        raise _no_split(root, split, [folder.name for folder in folders])
    home = found[0]
    images, masks, notes = _files(home)
    if home.name != split:
        notes.append(f"Split {split} is folder {home.name}: {len(images.files)} images")
    homes = [folder for folder in folders if folder == home or split_name(folder.name) in _SPLITS]
    samples = []
    for folder in homes:
        with contextlib.suppress(DataError):  # whoever reads that split says so
            samples.append(find_images(folder / "masks", nested=True).files)
    return Part(images, masks, set(images.files), home, homes, [*map(_first, filter(None, samples))], notes)


def _from_one_folder(root: Path, lists: dict[str, Path], split: str) -> Part:
    """The images of ``images`` that lists, or folders below it, or else a hash give to ``split``."""
    images, masks, notes = _files(root)
    stems, folder = set(images.files), root / "images"
    if lists:
        chosen = {name: _listed_stems(file, images, masks) for name, file in lists.items()}
        how = f"The split is that of {listed(file.name for file in lists.values())} in {root}"
        if unlisted := len(stems.difference(*chosen.values())):
            how += f", which leave out {unlisted} images"
        if repeated := sum(map(len, chosen.values())) - len(set().union(*chosen.values())):
            how += f", which name {repeated} images more than once"
    elif any(_splits_in(stem) for stem in stems):
        chosen = _by_folder(folder, stems)
        how = f"The split is that of the folders in {folder}"
    else:
        chosen, rule = _by_hash(stems)
        how = f"There is no split in {folder}, so {rule} (to choose, make images/train and images/val)"
    if split_name(split) not in chosen:
        raise _no_split(folder, split, chosen)
    mine = chosen[split_name(split)]
    if lists:
        scope = mine
    else:  # files without a partner are told too, unless they belong to another split
        scope = {stem for stem in stems | set(masks.files) if _splits_in(stem) <= {split_name(split)}}
    counts = ", ".join(f"{len(chosen[name])} {name}" for name in _SPLITS if name in chosen)
    samples = [_only(masks, stems).files for stems in chosen.values()]
    return Part(
        _only(images, scope),
        _only(masks, scope),
        mine,
        root,
        [root],
        [*map(_first, filter(None, samples))],
        [*notes, f"{how}: {counts}"],
    )


def _first(files: dict[str, Path]) -> Path:
    return files[min(files)]


def _only(found: Found, stems: set[str]) -> Found:
    return found._replace(files={stem: path for stem, path in found.files.items() if stem in stems})


def _files(home: Path) -> tuple[Found, Found, list[str]]:
    """The images, the masks by the same stems, and notes on what both are called."""
    inside = listed(sorted(entry.name for entry in home.glob("*") if entry.is_dir())) or "no folder"
    remedy = f"Expected images/ and masks/ in the root, or in train/ and val/ below it; found {inside}."
    images = find_images(require_folder(home / "images", "the folder of the images", remedy), nested=True)
    folder = require_folder(home / "masks", "the folder of the masks", remedy)
    return images, *without_ending(images, find_images(folder, nested=True), folder)


def _no_split(where: Path, split: str, splits: Iterable[str]) -> ConfigError:
    known = sorted(splits)
    return ConfigError(
        f"{where} has no split {split!r}; it has {', '.join(known)}{nearest(split, known)}; to let it be chosen, "
        "keep all images in images/ without such folders"
    )


def _splits_in(stem: str) -> set[str]:
    """The splits that the folders of ``stem`` are named after."""
    return {split_name(part) for part in PurePosixPath(stem).parent.parts} & set(_SPLITS)


def _by_folder(folder: Path, stems: set[str]) -> dict[str, set[str]]:
    """The stems by the split in their path, which all of them must have if one has."""
    chosen: dict[str, set[str]] = {}
    odd = []
    for stem in sorted(stems):
        splits = _splits_in(stem)
        if len(splits) == 1:
            chosen.setdefault(splits.pop(), set()).add(stem)
        else:
            odd.append(stem)
    if odd:
        raise DataError(
            f"{folder}: {len(odd)} images lie in the folder of no split or of two, such as {shortened(odd[0])}, but "
            f"{len(stems) - len(odd)} in that of one; move them, or rename the folders that are no splits"
        )
    return chosen


def _by_hash(stems: set[str]) -> tuple[dict[str, set[str]], str]:
    """Stems for train and val, and the rule in words. Images of one folder are often alike, and stay together."""
    sizes = Counter(os.path.dirname(stem) for stem in stems)
    if len(sizes) < 2:
        val, rule = held_out(stems), "about every fifth image, chosen by a hash of its name, is val"
    else:
        folders = held_out_folders(sizes)
        val = {stem for stem in stems if os.path.dirname(stem) in folders}
        names = listed(sorted(folder or "images/ itself" for folder in folders))
        rule = f"whole folders, chosen by a hash of their names, are val: {names}"
    return {"train": stems - val, "val": val}, rule


def _lists(root: Path) -> dict[str, Path]:
    """``train.txt``, ``val.txt`` and ``test.txt`` by split, under any of their names; none without the first two."""
    found: dict[str, Path] = {}
    for file in sorted(root.glob("*.txt")):
        split = split_name(file.stem)
        if split in _SPLITS and file.is_file():
            if split in found:
                raise DataError(f"{found[split]} and {file} are the same split by their names; keep one of the two")
            found[split] = file
    return found if found.keys() & {"train", "val"} else {}


def _listed_stems(file: Path, images: Found, masks: Found) -> set[str]:
    """The stems of a list's images: on each line an image's path, with or without its suffix, or a pair's paths."""
    stems, problems = set(), []
    folder = file.parent / "masks"
    masks_by_name = {_name(path, folder): stem for stem, path in masks.files.items()}
    images_by_name = {stem: stem for stem in images.files}
    for number, line in entries(
        file, lambda line: bool(_listed_stem(line.split("\t")[0].strip(), "images", images_by_name))
    ):
        fields = [field.strip() for field in line.split("\t")]
        stem = _listed_stem(fields[0], "images", images_by_name)
        if stem is None:
            problems.append(f"{file}:{number}: {shortened(fields[0])} is no image in {file.parent / 'images'}")
        elif len(fields) > 1 and _listed_stem(fields[1], "masks", masks_by_name) != stem:
            problems.append(
                f"{file}:{number}: {shortened(line)!r} pairs files of other stems; read it with --data list"
            )
        else:
            stems.add(stem)
    if problems:
        raise PairingError(file, problems)
    return stems


def _name(path: Path, folder: Path) -> str:
    return composed(os.path.splitext(path.relative_to(folder).as_posix())[0])


def _listed_stem(field: str, folder: str, stems: Mapping[str, str]) -> str | None:
    """The stem, by its file's name, that a list's path means, which may begin before or in ``folder``."""
    for text in spellings(field):
        path = PurePosixPath(composed(text))
        if folder in path.parts:
            path = PurePosixPath(*path.parts[path.parts.index(folder) + 1 :])
        for name in (str(path), os.path.splitext(path)[0]):
            if name in stems:
                return stems[name]
    return None
