"""The layout of data set ``folder`` with masks in colours, or in any other form in which it reads them."""

import functools
from pathlib import Path

from dfn_fast.data.convert.shapes import SPLITS, Annotations, Picture
from dfn_fast.data.datasets.classes import ClassTable
from dfn_fast.data.datasets.folder import FolderDataset
from dfn_fast.errors import ConfigError, DataError


def read(source: Path, table: ClassTable | None) -> Annotations:
    """Every split of the folder, as ``--data folder`` reads it."""
    datasets = []
    for split in SPLITS:
        try:
            datasets.append(FolderDataset(source, split, classes=table and table.source))
        except ConfigError as error:
            if "has no split" not in str(error):
                raise
    if not datasets:
        raise DataError(f"{source}: no split there is called {', '.join(SPLITS)}")
    pictures = [
        Picture(pair.image, dataset.split, pair.name, functools.partial(dataset.label, index))
        for dataset in datasets
        for index, pair in enumerate(dataset.pairs)
    ]
    notes = dict.fromkeys(note for dataset in datasets for note in dataset.notes)
    return Annotations(datasets[0].classes, pictures, list(notes), datasets[0].palette)
