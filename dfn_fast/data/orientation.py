"""EXIF orientations: a camera's note on how to turn an image. Image and label are read turned, each as its own says."""

from pathlib import Path

import numpy as np

from dfn_fast.errors import DataError
from dfn_fast.media.images import open_image, orientation


def orientation_of(path: Path) -> int:
    """The orientation in a file's header, 1 to 8; 1 (upright) where there is none, and for a file that is no image."""
    try:
        with open_image(path) as image:
            # Pillow would decode a PNG to look for one behind the pixels, where nobody puts it.
            return 1 if image.format == "PNG" and "exif" not in image.info else orientation(image)
    except DataError:  # whoever reads the file says why
        return 1


def require_same_way_up(image: np.ndarray, label: np.ndarray, ways: tuple[int, int], paths: tuple[Path, Path]) -> None:
    """Raises :class:`DataError` unless image and label, both turned by their orientations ``ways``, must fit.

    A label without an orientation was drawn on the image as viewers show it, or as it is stored. Only the sizes can
    tell, and only of an image that is turned by 90 degrees and not square.
    """
    of_image, of_label = ways
    quarter_turn = of_label == 1 and of_image >= 5 and image.shape[0] != image.shape[1]
    if of_image == of_label or (quarter_turn and image.shape[:2] == label.shape):
        return
    raise DataError(
        f"{paths[0]} has EXIF orientation {of_image}, its label {paths[1]} has {of_label} (1 is upright): which way up "
        "the label belongs is not clear. Save both upright, without an orientation, and look at one on top of the other"
    )
