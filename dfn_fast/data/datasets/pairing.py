"""Shared by the data sets on disk: paths that stay below a folder, pairs by stem, and pairs whose files all exist."""

import bisect
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from dfn_fast.data.base import Pair
from dfn_fast.errors import SHOWN, DataError, shortened
from dfn_fast.media.formats import picture_format
from dfn_fast.media.listing import Found, composed

LOSSY = (".jpg", ".jpeg", ".webp")


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
    for stem in sorted(files.files.keys() - others.files.keys()):
        hint = ""
        after = bisect.bisect(stems, stem)
        longer = stems[after : after + 1]  # the next stem, in which a mask's ending may follow
        if path := unread.get(PurePosixPath(stem).name):
            kind = picture_format(path)
            hint = f"; {path.name} is there, but {f'{kind} is not read' if kind else 'it is no image'}; save it as PNG"
        elif longer and longer[0].startswith(stem):
            hint = f"; is it {others.files[longer[0]].name}? Then give both the same name"
        problems.append(f"{files.files[stem]}: no {what} with this stem{hint}")
    return problems


def checked_pairs(pairs: Iterable[Pair], where: str | Path) -> list[Pair]:
    """The pairs as a list; raises :class:`PairingError` for missing files, lossy labels and repeated names."""
    pairs = list(pairs)
    folders: dict[Path, set[str]] = {}  # listing a folder once is far quicker than checking each of its files

    def exists(path: Path) -> bool:
        if path.parent not in folders:
            try:
                folders[path.parent] = set(os.listdir(path.parent))
            except (OSError, ValueError):  # missing, unreadable, or not a name that a folder can have
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
            problems.append(f"{pair.label}: lossy compression changes class ids; make the label again as PNG")
        if pair.name in seen:
            problems.append(f"{pair.image}: a second image named {pair.name!r}; names must be unique in a split")
        seen.add(pair.name)
    if problems:
        raise PairingError(where, problems)
    return pairs
