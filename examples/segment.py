"""Segments one image: python examples/segment.py CHECKPOINT IMAGE [OVERLAY]

CHECKPOINT is a run's best.pth, a checkpoint of DFN's authors, a safetensors file or a folder of save_pretrained.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from dfn_fast import Predictor, load_model
from dfn_fast.media.images import read_image, write_image
from dfn_fast.media.overlays import overlay


def main() -> None:
    checkpoint, image_file, *rest = sys.argv[1:]
    output = Path(rest[0] if rest else f"{Path(image_file).stem}_overlay.png")

    # The checkpoint knows how its network was built, and what its classes are called.
    loaded = load_model(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    predictor = Predictor(loaded.model, scales=(0.75, 1.0, 1.25), flip=True)

    image = read_image(image_file)  # RGB uint8 [H, W, 3]
    labels = predictor(image)  # class ids uint8 [H, W]
    write_image(output, overlay(image, labels, loaded.palette))

    print(predictor.describe())
    for class_id, pixels in enumerate(np.bincount(labels.ravel(), minlength=len(loaded.classes))):
        if pixels:
            print(f"{loaded.classes[class_id]:20} {pixels / labels.size:7.2%}")
    print(f"wrote {output}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main()
