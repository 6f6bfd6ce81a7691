"""What the data sets on disk share: lists of files, files by stem, and pairs whose files are all there."""

import os
from collections.abc import Iterable
from pathlib import Path

from dfn_fast.data.base import Pair
from dfn_fast.data.files import IMAGE_SUFFIXES
from dfn_fast.errors import DataError
from dfn_fast.regular_file import MAX_TEXT, require_regular

SHOWN = 5
LOSSY = (".jpg", ".jpeg", ".webp")


class PairingError(DataError):
    """Files of a split are missing or without a partner: the text names the first few, ``problems`` all of them."""

    def __init__(self, where: str | Path, problems: list[str]):
        self.problems = problems
        shown = [shortened(problem, 500) for problem in problems[:SHOWN]]
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        super().__init__("\n  ".join([f"{where}: {len(problems)} entries or files cannot be used:", *shown, *more]))


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 text file with their numbers from 1, without blank lines and ``#`` comments."""
    require_regular(path, DataError, "list", MAX_TEXT)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would break at letters of names too
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected a UTF-8 text file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: this list cannot be read ({error.strerror})") from error
    stripped = ((number, line.strip()) for number, line in enumerate(lines, 1))
    kept = [(number, line) for number, line in stripped if line and not line.startswith("#")]
    for number, line in kept:
        if "\0" in line:
            raise DataError(f"{path}:{number}: a null character, which no path has; expected a text file")
    return kept


def below(limit: Path | None, path: Path) -> Path:
    """``path`` without its ``..``; raises :class:`DataError` where it leaves the folder ``limit``, if there is one.

    Symbolic links are not followed: who made the folder has put them there, who wrote a list has not.
    """
    path = Path(os.path.normpath(path))
    if limit is None or Path(os.path.abspath(path)).is_relative_to(os.path.abspath(limit)):
        return path
    raise DataError(
        f"{shortened(path)} is outside of {limit}; move it there, or trust this list with --allow-outside-root"
    )


def shortened(text: str | Path, most: int = 200) -> str:
    """For the text of an error: a line of a file that is no list may have any length."""
    text = str(text)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def files_by_stem(folder: Path, *, nested: bool = False, ending: str = "") -> dict[str, Path]:
    """The image files of ``folder`` by their path below it, less suffix and ``ending``; hidden files are left out.

    ``nested`` takes the files of its subfolders too. Two files of one stem are an error.
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


def pair_by_stem(images: dict[str, Path], labels: dict[str, Path], where: str | Path) -> list[Pair]:
    """A pair for each stem; raises :class:`PairingError` for images without a label and labels without an image."""
    problems = [f"{images[stem]}: no label of this stem" for stem in sorted(images.keys() - labels.keys())]
    problems += [f"{labels[stem]}: no image of this stem" for stem in sorted(labels.keys() - images.keys())]
    if problems:
        raise PairingError(where, problems)
    return checked_pairs((Pair(images[stem], labels[stem], stem) for stem in sorted(images)), where)


def checked_pairs(pairs: Iterable[Pair], where: str | Path) -> list[Pair]:
    """The pairs as a list; raises :class:`PairingError` for files not there, lossy labels and names that repeat."""
    pairs = list(pairs)
    folders: dict[Path, set[str]] = {}  # listing a folder once is far quicker than asking for each of its files

    def exists(path: Path) -> bool:
        if path.parent not in folders:
            try:
                folders[path.parent] = set(os.listdir(path.parent))
            except (OSError, ValueError):  # not there, not to be read, or no name that a folder can have
                folders[path.parent] = set()
        return path.name in folders[path.parent]

    problems, seen = [], set()
    for pair in pairs:
        problems += [
            f"{path}: this {what} does not exist"
            for path, what in ((pair.image, "image"), (pair.label, "label"))
            if not exists(path)
        ]
        if pair.label.suffix.lower() in LOSSY:
            problems.append(f"{pair.label}: lossy compression changes class ids; make the label anew as PNG")
        if pair.name in seen:
            problems.append(f"{pair.image}: a second image named {pair.name!r}; names must be unique in a split")
        seen.add(pair.name)
    if problems:
        raise PairingError(where, problems)
    return pairs
