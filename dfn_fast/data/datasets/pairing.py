"""Shared by the data sets on disk: paths that stay below a folder, pairs by stem, and pairs whose files all exist."""

import bisect
import contextlib
import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from dfn_fast.data.base import Pair
from dfn_fast.errors import SHOWN, DataError, shortened
from dfn_fast.media.formats import picture_format
from dfn_fast.media.listing import Found, composed, read_lines

LOSSY = (".jpg", ".jpeg", ".webp")
MAX_GAPS = 30  # spaces in a line of two paths


class PairingError(DataError):
    """Files of a split are missing or without a partner: the text names the first few, ``problems`` all of them."""

    def __init__(self, where: str | Path, problems: list[str]):
        self.problems = problems
        shown = [shortened(problem, 500) for problem in problems[:SHOWN]]
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        super().__init__("\n  ".join([f"{where}: {len(problems)} entries or files cannot be used:", *shown, *more]))


def below(limit: Path | None, path: Path) -> Path:
    """``path`` without its ``..``; raises :class:`DataError` if it leaves the folder ``limit``, if there is one.

    Symbolic links are not followed: they come from whoever made the folder, not from whoever wrote the list.
    """
    path = Path(os.path.normpath(path))
    if limit is None or Path(os.path.abspath(path)).is_relative_to(os.path.abspath(limit)):
        return path
    raise DataError(
        f"{shortened(path)} is outside of {limit}; move it there, or trust this list with --allow-outside-root"
    )


def entries(list_file: Path, names_a_file: Callable[[str], bool]) -> list[tuple[int, str]]:
    """The lines of a list with their numbers. One that begins with ``#`` is a comment, unless it names a file."""

    def counts(line: str) -> bool:
        with contextlib.suppress(DataError):
            return not line.startswith("#") or names_a_file(line)
        return False

    return [(number, line) for number, line in read_lines(list_file, comments=True) if counts(line)]


def spellings(listed: str) -> list[str]:
    """A listed path as written, with Windows' separators turned, and in both forms of Unicode's composed letters."""
    turned = (listed, listed.replace("\\", "/"))
    others = (unicodedata.normalize(form, text) for text in turned for form in ("NFC", "NFD"))
    return list(dict.fromkeys((*turned, *others)))


def two_paths(line: str) -> list[tuple[str, str]]:
    """The pairs of paths that a line may mean: divided at a tab, or at any of its spaces, as names may have spaces."""
    if "\t" in line:
        fields = [field.strip() for field in line.split("\t")]
        return [(fields[0], fields[1])] if len(fields) == 2 else []
    gaps = list(itertools.islice(re.finditer(r"\s+", line), MAX_GAPS + 1))
    return [(line[: gap.start()], line[gap.end() :]) for gap in gaps] if len(gaps) <= MAX_GAPS else []


def pair_by_stem(images: Found, labels: Found, where: str | Path) -> list[Pair]:
    """A pair for each stem; raises :class:`PairingError` for images without a label and labels without an image."""
    problems = _without_partner(images, labels, "label") + _without_partner(labels, images, "image")
    if problems:
        raise PairingError(where, problems)
    pairs = (Pair(images.files[stem], labels.files[stem], stem) for stem in sorted(images.files))
    return checked_pairs(pairs, where)


def _without_partner(files: Found, others: Found, what: str) -> list[str]:
    """A problem for each file without a partner in ``others``, with the file there that might have been meant."""
    problems = []
    unread = {composed(path.stem): path for path in others.passed_over}
    stems = sorted(others.files)
    folded = {stem.casefold(): path for stem, path in others.files.items()}
    for stem in sorted(files.files.keys() - others.files.keys()):
        hint = ""
        after = bisect.bisect(stems, stem)
        longer = [other for other in stems[after : after + 1] if other.startswith(stem)]  # a mask's ending may follow
        if path := unread.get(PurePosixPath(stem).name):
            kind = picture_format(path)
            hint = f"; {path.name} is there, but {f'{kind} is not read' if kind else 'it is no image'}; save it as PNG"
        elif path := folded.get(stem.casefold()) or next((others.files[other] for other in longer), None):
            hint = f"; is it {path.name}? Then give both the same name"
        problems.append(f"{files.files[stem]}: no {what} with this stem{hint}")
    return problems


class Existing:
    """``exists(path)``: is there such a file? Listing a folder once is far quicker than asking for each file."""

    def __init__(self) -> None:
        self._folders: dict[Path, set[str]] = {}

    def __call__(self, path: Path) -> bool:
        if path.parent not in self._folders:
            try:
                self._folders[path.parent] = set(os.listdir(path.parent))
            except (OSError, ValueError):  # missing, unreadable, or not a name that a folder can have
                self._folders[path.parent] = set()
        return path.name in self._folders[path.parent]


def checked_pairs(pairs: Iterable[Pair], where: str | Path) -> list[Pair]:
    """The pairs as a list; raises :class:`PairingError` for missing files, lossy labels and repeated names."""
    pairs = list(pairs)
    exists = Existing()
    problems, seen = [], set()
    for pair in pairs:
        problems += [
            f"{path}: this {what} does not exist"
            for path, what in ((pair.image, "image"), (pair.label, "label"))
            if not exists(path)
        ]
        if pair.label.suffix.lower() in LOSSY:
            problems.append(f"{pair.label}: lossy compression changes class ids; make the label again as PNG")
        if pair.name in seen:
            problems.append(f"{pair.image}: a second image named {pair.name!r}; names must be unique in a split")
        seen.add(pair.name)
    if problems:
        raise PairingError(where, problems)
    return pairs
