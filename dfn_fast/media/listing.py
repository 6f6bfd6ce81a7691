"""Folders and text files that name images."""

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dfn_fast.errors import DataError, listed
from dfn_fast.files import MAX_TEXT, require_regular
from dfn_fast.media.formats import FORMATS, IMAGE_SUFFIXES, picture_format

MAX_FOLDERS = 1_000_000
# Left by file managers and archives beside every picture, in folders that a user did not make.
_BYPRODUCTS = ("@eaDir", "__MACOSX", "Thumbs.db", "desktop.ini")


def read_lines(path: Path, *, comments: bool = False) -> list[tuple[int, str]]:
    """The lines of a UTF-8 text file with their numbers from 1, without blank lines and, usually, ``#`` comments."""
    require_regular(path, DataError, "list", MAX_TEXT)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines also breaks at letters in names
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected a UTF-8 text file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: this list cannot be read ({error.strerror})") from error
    stripped = ((number, line.strip()) for number, line in enumerate(lines, 1))
    kept = [(number, line) for number, line in stripped if line and (comments or not line.startswith("#"))]
    for number, line in kept:
        if "\0" in line:
            raise DataError(f"{path}:{number}: found a null character, which no path has; expected a text file")
    return kept


class Found(NamedTuple):
    """The images of a folder, and its other files; those that are hidden or made by a file manager are in neither."""

    files: dict[str, Path]  # by their path below the folder, in NFC, without suffix and ``ending``
    passed_over: list[Path]  # of other kinds, or without a stem of their own; folders too, if they were not entered

    @property
    def note(self) -> str:
        """One sentence on what was passed over; empty if nothing was."""
        if not self.passed_over:
            return ""
        count = f"{len(self.passed_over)} file{'s' * (len(self.passed_over) > 1)}"
        names = listed(str(path) for path in self.passed_over)
        return f"passed over {count}, being no image or a second one of the same stem: {names}"


def find_images(folder: Path, *, nested: bool = False, ending: str = "") -> Found:
    """The images of ``folder`` whose stems end in ``ending``.

    A suffix of ``IMAGE_SUFFIXES`` is believed; of other files the first bytes decide. ``nested`` includes subfolders,
    also those that are symbolic links. Raises :class:`DataError` for two files with one stem, unless only one of them
    has such a suffix, and for a folder that cannot be read.
    """
    files: dict[str, Path] = {}
    sniffed: list[tuple[str, Path]] = []
    passed_over: list[Path] = []
    for parent, folders, names in _walk(folder, nested):
        below = parent.relative_to(folder)
        passed_over += [parent / name for name in folders]
        for name in names:
            stem, suffix = os.path.splitext(name)
            if not stem.endswith(ending):
                continue
            path, key = parent / name, composed((below / stem.removesuffix(ending)).as_posix())
            if not stem.removesuffix(ending):
                passed_over.append(path)
            elif suffix.lower() not in IMAGE_SUFFIXES:
                sniffed.append((key, path))
            elif key in files:
                raise DataError(f"{path}: {files[key].name} has the same stem; keep one of the two")
            else:
                files[key] = path
    for key, path in sniffed:
        if key not in files and picture_format(path) in FORMATS:
            files[key] = path
        else:
            passed_over.append(path)
    return Found(files, sorted(passed_over))


def files_by_stem(folder: Path, *, nested: bool = False, ending: str = "") -> dict[str, Path]:
    """The files of :func:`find_images`."""
    return find_images(folder, nested=nested, ending=ending).files


def composed(name: str) -> str:
    """A name in NFC, in which names are compared: macOS writes an umlaut as two characters."""
    return unicodedata.normalize("NFC", name)


def _walk(folder: Path, nested: bool) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each folder with the names of its files, and of its subfolders if they are not ``nested``.

    A link that leads back to a folder above it is not followed again.
    """
    if not os.path.isdir(folder):
        return
    seen = 0
    waiting: list[tuple[Path, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    while waiting:
        parent, above = waiting.pop()
        try:
            status = os.stat(parent)
            place = (status.st_dev, status.st_ino)
            if place in above:
                continue
            seen += 1
            if seen > MAX_FOLDERS:
                raise DataError(f"{folder}: more than {MAX_FOLDERS} folders below it; do its links lead to each other?")
            with os.scandir(parent) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{parent}: this folder cannot be read ({error.strerror})") from error
        found = [entry for entry in found if not entry.name.startswith(".") and entry.name not in _BYPRODUCTS]
        # Most file systems tell a folder without a look at each file; a link has to be followed.
        is_folder = {e.name: os.path.isdir(e.path) if e.is_symlink() else e.is_dir() for e in found}
        folders = [name for name in is_folder if is_folder[name]]
        yield parent, [] if nested else folders, [name for name in is_folder if not is_folder[name]]
        if nested:
            waiting += [(parent / name, above | {place}) for name in reversed(folders)]
