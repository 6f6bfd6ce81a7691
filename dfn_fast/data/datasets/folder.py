"""Your own images: a folder of images and a folder of masks.

``folder`` pairs images and masks by their path below ``images`` and ``masks``, without the suffix::

    ROOT/
      images/a.jpg  images/night/b.png ...
      masks/a.png   masks/night/b.png ...   class ids 0..254 in one 8-bit channel or a palette; 255: ignore
      classes.txt                           one class per line: name, or name R G B

A split that you made is kept: ``ROOT/images/{train,val}``, ``ROOT/train/{images,masks}``, or lists of images
``ROOT/{train,val}.txt``; valid and validation mean val. Without one, val is about every fifth image, chosen by a hash
of that path: the same on every machine, whatever other images there are. If there are folders below images, val is
some of them, because images of one folder are often alike. ``--classes FILE`` or ``--num-classes N`` replaces
classes.txt.
"""

from pathlib import Path

from dfn_fast.data.base import SegmentationDataset
from dfn_fast.data.datasets.classes import class_table
from dfn_fast.data.datasets.classes import read_classes as read_classes
from dfn_fast.data.datasets.layout import find_part
from dfn_fast.data.datasets.layout import held_out as held_out
from dfn_fast.data.datasets.pairing import pair_by_stem
from dfn_fast.data.palettes import Palettes


class FolderDataset(SegmentationDataset):
    """A split of the layout in this file's docstring."""

    name = "folder"

    def __init__(
        self, root: str | Path, split: str, *, num_classes: int | None = None, classes: str | Path | None = None
    ):
        root = Path(root)
        part = find_part(root, split)
        pairs = pair_by_stem(part.images, part.masks, part.home)
        pairs = [pair for pair in pairs if pair.name in part.stems]
        table = class_table([root, *part.homes], num_classes, classes)
        self.classes, self.palette = table.names, table.palette
        self.palettes = Palettes(table.colours, table.source, part.samples)
        notes = [*part.notes, part.images.note, part.masks.note]
        super().__init__(pairs, split, part.home, filter(None, notes))
