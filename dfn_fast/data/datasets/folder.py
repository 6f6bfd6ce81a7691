"""Your own images: a folder of images and a folder of masks.

``folder`` pairs images and masks by their path below ``images`` and ``masks``, without the suffix and, in all
masks alike, an ending such as ``_mask``::

    ROOT/
      images/a.jpg  images/night/b.png ...
      masks/a.png   masks/night/b.png ...   class ids 0..254 (255: ignore), or the colours in classes.txt
      classes.txt                           one class per line: name, or name R G B

A split that you made is kept: ``ROOT/images/{train,val}``, ``ROOT/train/{images,masks}``, or lists of images
``ROOT/{train,val}.txt``; valid and validation mean val. Without one, val is about every fifth image, chosen by a hash
of that path: the same on every machine, whatever other images there are. If there are folders below images, val is
some of them, because images of one folder are often alike. ``--classes FILE`` or ``--num-classes N`` replaces
classes.txt.
"""

from pathlib import Path

from dfn_fast.data.datasets.classes import class_table
from dfn_fast.data.datasets.classes import read_classes as read_classes
from dfn_fast.data.datasets.layout import find_part
from dfn_fast.data.datasets.layout import held_out as held_out
from dfn_fast.data.datasets.masks import MaskDataset, Numbering
from dfn_fast.data.datasets.pairing import pair_by_stem


class FolderDataset(MaskDataset):
    """A split of the layout in this file's docstring."""

    name = "folder"

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        num_classes: int | None = None,
        classes: str | Path | None = None,
        ignore_value: int | None = None,
        label_offset: int = 0,
    ):
        root = Path(root)
        part = find_part(root, split)
        pairs = pair_by_stem(part.images, part.masks, part.home)
        pairs = [pair for pair in pairs if pair.name in part.stems]
        table = class_table([root, *part.homes], num_classes, classes)
        notes = filter(None, [*part.notes, part.images.note, part.masks.note])
        numbering = Numbering(ignore_value, label_offset)
        super().__init__(pairs, split, part.home, table, numbering, notes, part.samples)
