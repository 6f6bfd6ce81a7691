"""Folders and text files that name images."""

import os
from pathlib import Path

from dfn_fast.errors import DataError
from dfn_fast.files import MAX_TEXT, require_regular
from dfn_fast.media.images import IMAGE_SUFFIXES


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 text file with their numbers from 1, without blank lines and ``#`` comments."""
    require_regular(path, DataError, "list", MAX_TEXT)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines also breaks at letters in names
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected a UTF-8 text file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: this list cannot be read ({error.strerror})") from error
    stripped = ((number, line.strip()) for number, line in enumerate(lines, 1))
    kept = [(number, line) for number, line in stripped if line and not line.startswith("#")]
    for number, line in kept:
        if "\0" in line:
            raise DataError(f"{path}:{number}: found a null character, which no path has; expected a text file")
    return kept


def files_by_stem(folder: Path, *, nested: bool = False, ending: str = "") -> dict[str, Path]:
    """The image files of ``folder`` by their path below it without suffix and ``ending``; hidden files are skipped.

    ``nested`` includes the files of its subfolders. Two files with the same stem are an error.
    """
    files: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if nested else []
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if name.startswith(".") or suffix.lower() not in IMAGE_SUFFIXES or not stem.endswith(ending):
                continue
            path = Path(parent, name)
            key = path.relative_to(folder).with_name(stem.removesuffix(ending)).as_posix()
            if key in files:
                raise DataError(f"{path}: {files[key].name} has the same stem; keep one of the two")
            files[key] = path
    return files
