"""SBD's labels (Hariharan et al., ICCV 2011) as the augmented training set of VOC 2012.

``python -m dfn_fast.data convert-sbd SBD_ROOT VOC_ROOT`` reads::

    SBD_ROOT/                 or benchmark_RELEASE/dataset or dataset below it
      cls/2008_000002.mat ...   GTcls.Segmentation: [H, W] class ids
      img/2008_000002.jpg ...   used only for images that VOC's JPEGImages lacks
      train.txt  val.txt        8,498 and 2,857 ids

and writes ``SegmentationClassAug/*.png`` and ``ImageSets/Segmentation/train_aug.txt`` into VOC2012: SBD's train and val
and VOC's train, without VOC's val, 10,582 images. An image that VOC has labelled itself keeps VOC's label.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dfn_fast.data.datasets.pairing import PairingError
from dfn_fast.data.datasets.voc import VocDataset, find_voc, listed_pairs, segmentation_list
from dfn_fast.errors import ConfigError, DataError, shortened
from dfn_fast.files import write_text
from dfn_fast.media.images import read_label, write_label
from dfn_fast.media.listing import read_lines


class Converted(NamedTuple):
    """The result of :func:`convert_sbd`."""

    list_file: Path
    images: int  # in the list
    written: int  # labels; the others were there from an earlier run
    sbd_images: int  # images that the list takes from SBD's img folder


def convert_sbd(sbd_root: str | Path, voc_root: str | Path) -> Converted:
    """Writes VOC's augmented labels and their list; existing labels are kept, so it can be run again.

    Raises :class:`PairingError` with every label that cannot be made; the list is written only if there is none.
    """
    sbd, voc = _find_sbd(Path(sbd_root)), find_voc(Path(voc_root))
    target = voc / "SegmentationClassAug"
    list_file = segmentation_list(voc, "train_aug")
    ids = _augmented_ids(sbd, voc)
    lines, problems = [], []
    written = 0
    try:
        target.mkdir(exist_ok=True)
        for name in tqdm(ids, desc="labels", unit="image"):
            try:
                lines.append(_list_line(name, sbd, voc))
                written += _make_label(name, sbd, voc, target / f"{name}.png")
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise PairingError(sbd, problems)
        write_text(list_file, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise DataError(
            f"{error.filename or target}: cannot be written ({error.strerror}); run the command again to continue"
        ) from error
    return Converted(list_file, len(ids), written, sum(" " in line for line in lines))


def _find_sbd(root: Path) -> Path:
    """The folder of SBD with ``cls`` in it, at or below ``root``."""
    for home in (root, root / "dataset", root / "benchmark_RELEASE" / "dataset"):
        if (home / "cls").is_dir():
            return home
    raise DataError(
        f"{root}: expected cls, train.txt and val.txt in it, in its dataset or in its benchmark_RELEASE/dataset; "
        "give the folder of the unpacked benchmark.tgz as SBD_ROOT"
    )


def _read_mat(path: Path) -> np.ndarray:
    """``GTcls.Segmentation`` of a ``.mat`` file of SBD: class ids, ``[H, W]`` uint8."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ConfigError("reading SBD's .mat files needs SciPy: pip install scipy") from None
    if not path.is_file():
        raise DataError(f"{path}: this label does not exist")
    try:
        labels = np.asarray(loadmat(path)["GTcls"]["Segmentation"][0, 0])
    except Exception as error:  # a damaged file makes SciPy raise nearly anything
        raise DataError(f"{path}: expected a .mat file with GTcls.Segmentation ({error}); unpack it again") from error
    if labels.ndim != 2 or labels.dtype.kind not in "ui" or labels.max(initial=0) >= VocDataset.palette.shape[0]:
        raise DataError(
            f"{path}: expected [H, W] class ids from 0 to 20, got {labels.dtype} {list(labels.shape)}; unpack it again"
        )
    return labels.astype(np.uint8)


def _augmented_ids(sbd: Path, voc: Path) -> list[str]:
    listed = {split: _ids(sbd / f"{split}.txt") for split in ("train", "val")}
    own = {
        split: [pair.name for pair in listed_pairs(voc, segmentation_list(voc, split), "SegmentationClass", voc)]
        for split in ("train", "val")
    }
    return sorted({*listed["train"], *listed["val"], *own["train"]}.difference(own["val"]))


def _ids(list_file: Path) -> list[str]:
    """The ids of a list; they name files to write, so one with a folder in it is an error."""
    ids = []
    for number, line in read_lines(list_file):
        if Path(line).name != line or "\\" in line:
            raise DataError(f"{list_file}:{number}: expected an id such as 2008_000002, got {shortened(line)!r}")
        ids.append(line)
    return ids


def _make_label(name: str, sbd: Path, voc: Path, target: Path) -> bool:
    """Writes the label if it does not exist; returns whether it did."""
    if target.is_file():
        return False
    own = voc / "SegmentationClass" / f"{name}.png"
    labels = read_label(own) if own.is_file() else _read_mat(sbd / "cls" / f"{name}.mat")
    write_label(target, labels, VocDataset.palette)
    return True


def _list_line(name: str, sbd: Path, voc: Path) -> str:
    """The id, or both paths if the image lies only in SBD's folder."""
    if (voc / "JPEGImages" / f"{name}.jpg").is_file():
        return name
    image = sbd / "img" / f"{name}.jpg"
    if not image.is_file():
        raise DataError(f"{voc / 'JPEGImages' / image.name}: this image does not exist, nor does {image}")
    return f"{os.path.relpath(image, voc)} SegmentationClassAug/{name}.png"
