"""Which classes the labels of a data set have: asked before a training, which would not notice that one is missing."""

import contextlib
import time
from dataclasses import dataclass

import numpy as np

from dfn_fast.data.base import FILE_SECONDS, IGNORE, SegmentationDataset
from dfn_fast.errors import DataError, listed
from dfn_fast.media.images import read_label
from dfn_fast.runtime.time_limit import within


@dataclass
class Survey:
    """The classes in some or all labels of ``dataset``."""

    dataset: SegmentationDataset
    pixels: np.ndarray  # [256] int64: how many pixels of the labels read have each class id
    read: int  # labels

    @property
    def complete(self) -> bool:
        """Whether nothing is left to find: every label was read, or every class was seen."""
        return self.read == len(self.dataset) or not self.absent

    @property
    def present(self) -> list[int]:
        return [i for i in range(self.dataset.num_classes) if self.pixels[i]]

    @property
    def absent(self) -> list[int]:
        return [i for i in range(self.dataset.num_classes) if not self.pixels[i]]

    @property
    def warnings(self) -> list[str]:
        """Whole sentences, for a user to read before a training; none if every class was seen."""
        if not self.read or not self.absent:
            return []
        names = listed((self.dataset.classes[i] for i in self.absent), 20)
        return [f"classes that are in no label: {names} ({self._extent}){self._question}"]

    def require_trainable(self) -> None:
        """Raises :class:`DataError` if the labels, all of which were read, have no pixel of a class, or of one only."""
        if not self.read or not self.complete or len(self.present) > 1:
            return
        if not self.present:
            raise DataError(
                f"{self.dataset.where}: no label of split {self.dataset.split!r} has a pixel of a class, "
                f"all are {IGNORE} ({self._extent}){self._example}; a network can learn nothing from them"
            )
        only = self.dataset.classes[self.present[0]]
        raise DataError(
            f"{self.dataset.where}: every labelled pixel of split {self.dataset.split!r} has class {only!r} "
            f"({self._extent}), and a network that always answers {only!r} would be perfect{self._question}"
        )

    @property
    def _extent(self) -> str:
        return f"{self.read} of {len(self.dataset)} labels read"

    @property
    def _question(self) -> str:
        """Drawing tools save an object in white, which is 255."""
        names, absent = self.dataset.classes, self.absent
        if not self.pixels[IGNORE] or len(self.present) > 1:
            return ""
        meant = repr(names[absent[0]]) if len(absent) == 1 else "a class"
        value = str(absent[0]) if len(absent) == 1 else "the id of that class"
        return (
            f". {100 * self.pixels[IGNORE] / self.pixels.sum():.0f} % of the pixels are {IGNORE}, which is ignored: "
            f"is it meant as {meant}? Then write {value} in its place"
        )

    @property
    def _example(self) -> str:
        """The values in one of the files, where the data set takes all of them for void."""
        with contextlib.suppress(DataError):
            path = self.dataset.pairs[0].label
            values = [int(v) for v in np.unique(read_label(path)) if v != IGNORE]
            if values:
                return (
                    f"; the values {listed(map(str, values))} of {path} are void in data set {self.dataset.name!r}: "
                    "are they ids of classes of your own? Then read them with --data folder or --data list"
                )
        return ""


def survey(dataset: SegmentationDataset, *, seconds: float = 20.0) -> Survey:
    """Reads labels all over ``dataset`` until every class was seen, each was read, or ``seconds`` have passed.

    Generated scenes have no files, and are not read. Raises :class:`DataError` for a label that cannot be read, or
    that holds a value that is not a class.
    """
    found = Survey(dataset, np.zeros(256, np.int64), 0)
    end = time.monotonic() + seconds
    for index in np.random.default_rng(0).permutation(len(dataset.pairs)).tolist():
        path = dataset.pairs[index].label
        slow = DataError(f"{path}: this label was not read within {FILE_SECONDS} s; is it damaged?")
        label = within(FILE_SECONDS, lambda i=index: dataset.label(i), slow)  # type: ignore[misc]
        dataset.check_values(label, path)
        found.pixels += np.bincount(label.ravel(), minlength=256)
        found.read += 1
        if found.complete or time.monotonic() > end:
            break
    return found
