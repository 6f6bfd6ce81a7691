"""Reads every file of a data set once: ``python -m dfn_fast.data check`` finds errors before a training run does.

Problems make the exit code 1: files that cannot be read or do not belong together, label values that are not classes,
and images that are both in a training split and in a validation split. Warnings and notes do not.
"""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dfn_fast.data.base import FILE_SECONDS, IGNORE, SegmentationDataset
from dfn_fast.data.datasets.pairing import PairingError
from dfn_fast.data.registry import build_dataset, find_entry
from dfn_fast.data.survey import Survey
from dfn_fast.errors import DataError
from dfn_fast.media.images import open_image
from dfn_fast.runtime.time_limit import within

_MODES = {  # how an image is read if its mode is not RGB
    "are greyscale, read as three equal channels": ("1", "L"),
    "have a palette, read as RGB": ("P",),
    "have an alpha channel, which is dropped": ("LA", "PA", "RGBA"),
    "are in CMYK, read as RGB": ("CMYK",),
}


class Observation(NamedTuple):
    """The findings on one sample; ``size`` and ``pixels`` are None if they cannot be known."""

    size: tuple[int, int] | None  # width, height
    pixels: np.ndarray | None  # [256] int64: how many pixels have each class id
    mode: str  # Pillow's name for the image file's channels, "" if there is no such file
    digest: bytes | None  # of the image file's bytes
    problems: list[str]
    remarks: Sequence[str] = ()  # on how the image is read


@dataclass
class SplitReport:
    """The findings on the samples of one split."""

    split: str
    names: list[str] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height) of the images that can be read
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # by class id
    digests: dict[bytes, list[str]] = field(default_factory=lambda: defaultdict(list))  # names by content
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def shares(self) -> np.ndarray:
        """The share of each class id among all pixels, ``[256]``; 0 if no label could be read."""
        return self.pixels / max(1, self.pixels.sum())

    def size_summary(self) -> dict[str, tuple[int, int]]:
        """The (width, height) of the images with the fewest, median and most pixels, and the most common size."""
        if not self.sizes:
            return {}
        ordered = sorted(self.sizes.elements(), key=lambda size: size[0] * size[1])
        return {
            "smallest": ordered[0],
            "median": ordered[len(ordered) // 2],
            "largest": ordered[-1],
            "most common": self.sizes.most_common(1)[0][0],
        }


@dataclass
class Report:
    """The findings of :func:`check`."""

    dataset: str
    root: str | None
    classes: tuple[str, ...]
    splits: list[SplitReport]
    problems: list[str]  # between splits
    notes: list[str]  # between splits

    def all_problems(self) -> list[str]:
        return [f"{s.split}: {problem}" for s in self.splits for problem in s.problems] + self.problems

    def all_warnings(self) -> list[str]:
        return [f"{s.split}: {warning}" for s in self.splits for warning in s.warnings]

    def all_notes(self) -> list[str]:
        return [f"{s.split}: {note}" for s in self.splits for note in s.notes] + self.notes

    def as_json(self) -> dict[str, Any]:
        """The report in plain types; pixel shares are fractions, class ids are keys."""
        return {
            "dataset": self.dataset,
            "root": self.root,
            "classes": list(self.classes),
            "splits": {
                s.split: {
                    "images": len(s.names),
                    "sizes": {f"{w}x{h}": count for (w, h), count in s.sizes.most_common()},
                    "pixel_share": {str(v): float(s.shares()[v]) for v in np.flatnonzero(s.pixels)},
                }
                for s in self.splits
            },
            "problems": self.all_problems(),
            "warnings": self.all_warnings(),
            "notes": self.all_notes(),
        }


def check(
    name: str,
    root: str | Path | None,
    splits: list[str] | None = None,
    *,
    num_classes: int | None = None,
    classes: str | Path | None = None,
    ignore_value: int | None = None,
    label_offset: int = 0,
    allow_outside_root: bool = False,
    workers: int = 2,
    file_timeout: float = FILE_SECONDS,
) -> Report:
    """Reads every sample of the splits, by default the data set's train and val, in ``workers`` threads.

    A sample that takes more than ``file_timeout`` seconds is a problem in the report, as is a split with a wrong
    layout; 0 seconds are no limit. An option that makes no sense raises :class:`ConfigError`.
    """
    entry = find_entry(name)
    asked = splits or [entry.train, entry.val]
    parts = list(dict.fromkeys(part for split in asked for part in split.split("+")))
    reports: list[SplitReport] = []
    datasets: list[SegmentationDataset] = []
    class_names: tuple[str, ...] = ()
    read_how: dict[str, None] = {}  # a note on several splits is shown once
    for split in parts:
        try:
            dataset = build_dataset(
                name,
                root,
                split,
                num_classes=num_classes,
                classes=classes,
                ignore_value=ignore_value,
                label_offset=label_offset,
                allow_outside_root=allow_outside_root,
            )
        except DataError as error:
            problems = error.problems if isinstance(error, PairingError) else [str(error)]
            reports.append(SplitReport(split, problems=problems))
            continue
        datasets.append(dataset)
        class_names = dataset.classes
        read_how |= dict.fromkeys(dataset.notes)
        reports.append(_check_split(dataset, _observe(dataset, workers, file_timeout), entry.counts.get(split)))
    problems, notes = _overlaps(reports)
    problems += _palette_problems(datasets)
    return Report(name, None if root is None else str(root), class_names, reports, problems, [*read_how, *notes])


def _check_split(dataset: SegmentationDataset, samples: Iterator[Observation], published: int | None) -> SplitReport:
    """The findings on the ``samples`` of ``dataset``; ``published`` is how many the published split has."""
    report = SplitReport(dataset.split, dataset.names())
    ways: Counter[str] = Counter()  # in which images are read
    labels = only_ignored = 0
    progress = tqdm(samples, dataset.split, len(dataset), unit="image")
    for seen, name in zip(progress, report.names, strict=True):
        report.problems += seen.problems
        ways.update([*seen.remarks, *(what for what, modes in _MODES.items() if seen.mode in modes)])
        if seen.size is not None:
            report.sizes[seen.size] += 1
        if seen.pixels is not None:
            labels += not seen.problems
            report.pixels += seen.pixels
            only_ignored += bool(seen.pixels[IGNORE] == seen.pixels.sum())
        if seen.digest is not None:
            report.digests[seen.digest].append(name)
    survey = Survey(dataset, report.pixels, labels)
    try:
        survey.require_trainable()
        report.warnings += survey.warnings
    except DataError as error:
        (report.warnings if _held_out(dataset.split) else report.problems).append(str(error))
    report.notes += _notes(report, ways, only_ignored, published)
    return report


def _observation(dataset: SegmentationDataset, index: int) -> Observation:
    """Reads one sample and continues after an error, because an image and its label may both be wrong."""
    pair = dataset.pairs[index] if dataset.pairs else None
    mode, digest = _image_file(pair.image) if pair else ("", None)
    remarks: list[str] = []
    try:
        sample = dataset.read(index, remarks) if pair else dataset[index]
    except DataError as error:
        problems, pixels = [str(error)], None
        if pair:
            try:
                pixels = _histogram(dataset.label(index))
            except DataError as second:
                problems += [str(second)] if str(second) != str(error) else []
        return Observation(None, pixels, mode, digest, problems)
    if digest is None:
        digest = hashlib.blake2b(sample.image.tobytes(), digest_size=16).digest()
    height, width = sample.label.shape
    return Observation((width, height), _histogram(sample.label), mode, digest, [], remarks)


def _overlaps(reports: list[SplitReport]) -> tuple[list[str], list[str]]:
    """Problems and notes about the images that each two splits share, by content and by name."""
    problems: list[str] = []
    notes: list[str] = []
    for a, b in itertools.combinations(reports, 2):
        same = [names[0] for digest, names in a.digests.items() if digest in b.digests]
        renamed = set(a.names) & set(b.names) - set(same)
        if same:
            text = f"{a.split} and {b.split} share {len(same)} images with identical content: {_first(same)}"
            (problems if _must_differ(a.split, b.split) else notes).append(text)
        if renamed and _must_differ(a.split, b.split):
            notes.append(
                f"{a.split} and {b.split} share {len(renamed)} names whose images differ: {_first(sorted(renamed))}"
            )
    return problems, notes


def _palette_problems(datasets: list[SegmentationDataset]) -> list[str]:
    """Where the palettes of two splits contradict each other."""
    palettes = [dataset.palettes for dataset in datasets if dataset.palettes]
    problems = []
    for other in palettes[1:]:
        try:
            palettes[0].agree(other)
        except DataError as error:
            problems.append(str(error))
    return problems


def _must_differ(a: str, b: str) -> bool:
    """Training splits may contain each other, as trainval contains val; no other may overlap with val or test."""
    return (_held_out(a) or _held_out(b)) and "trainval" not in (Path(a).stem, Path(b).stem)


def _held_out(split: str) -> bool:
    name = Path(split).stem.casefold()  # a list's split may be a path
    return ("val" in name or "test" in name) and not name.startswith("train")


def _observe(dataset: SegmentationDataset, workers: int, seconds: float) -> Iterator[Observation]:
    def observation(index: int) -> Observation:
        name = dataset.pairs[index].image if dataset.pairs else index
        slow = DataError(
            f"{name}: this image and its label were not read within {seconds:g} s; are they damaged? If not, allow "
            "more with --file-timeout"
        )
        try:
            return within(seconds, lambda: _observation(dataset, index), slow)
        except DataError as error:
            return Observation(None, None, "", None, [str(error)])

    with ThreadPool(workers) as pool:  # decoding and hashing let other threads run
        yield from pool.imap(observation, range(len(dataset)))


def _image_file(path: Path) -> tuple[str, bytes | None]:
    """Pillow's mode and a hash of the content; "" and None for an unreadable file: reading the sample says why."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open_image(path) as image, path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
            return image.mode, digest.digest()
    except (OSError, DataError):
        return "", None


def _histogram(labels: np.ndarray) -> np.ndarray:
    return np.bincount(labels.ravel(), minlength=256)


def _notes(report: SplitReport, ways: Counter[str], only_ignored: int, published: int | None) -> list[str]:
    notes = []
    if published not in (None, len(report.names)):
        notes.append(f"{len(report.names)} images, but the published split has {published}")
    notes += [f"{ways[what]} images {what}" for what in sorted(ways)]
    if only_ignored:
        notes.append(f"{only_ignored} labels are {IGNORE} everywhere")
    twice = [names for names in report.digests.values() if len(names) > 1]
    if twice:
        notes.append(f"{len(twice)} images occur more than once: {_first([' = '.join(names) for names in twice])}")
    return notes


def _first(names: list[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
