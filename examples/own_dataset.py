"""A data set of your own, whose label files hold other values than class ids: python examples/own_dataset.py [FOLDER]

Without images in FOLDER (default: discs) it draws some there first.
"""

import sys
from pathlib import Path

import cv2
import numpy as np

from dfn_fast.data import IGNORE, Pair, SegmentationDataset
from dfn_fast.data.loader import TrainLoader
from dfn_fast.data.transforms import TrainTransform
from dfn_fast.media.images import write_image, write_label


class Discs(SegmentationDataset):
    """Discs on a plain ground. Their label files hold 100 for a disc and 0 for the ground."""

    name = "discs"
    classes = ("ground", "disc")
    palette = np.array([[90, 120, 80], [220, 160, 40]], np.uint8)

    def __init__(self, root: Path, split: str):
        images = sorted((root / "photos").glob("*.png"))
        pairs = [Pair(path, root / "truth" / path.name, path.stem) for path in images]
        super().__init__(pairs, split, root)

    def class_ids(self, raw: np.ndarray, path: Path) -> np.ndarray:
        table = np.full(256, IGNORE, np.uint8)  # a value that is in no class is ignored
        table[[0, 100]] = 0, 1
        return table[raw]


def draw(root: Path, count: int = 8) -> None:
    for folder in ("photos", "truth"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        image, label = np.full((80, 100, 3), Discs.palette[0]), np.zeros((80, 100), np.uint8)
        centre, radius = (int(rng.integers(100)), int(rng.integers(80))), int(rng.integers(8, 25))
        cv2.circle(image, centre, radius, Discs.palette[1].tolist(), -1)
        cv2.circle(label, centre, radius, 100, -1)
        write_image(root / "photos" / f"{i}.png", image)
        write_label(root / "truth" / f"{i}.png", label, Discs.palette)


def main(root: Path) -> None:
    if not root.exists():
        draw(root)
    dataset = Discs(root, "train")
    transform = TrainTransform(crop=(64, 64), scales=(0.75, 1.0, 1.5), flip=True, border_width=3)
    loader = TrainLoader(dataset, transform, batch_size=4, seed=0, workers=0)
    for batch in loader.epoch(0):
        print(", ".join(batch.names), list(batch.images.shape), batch.labels.unique().tolist())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "discs"))
