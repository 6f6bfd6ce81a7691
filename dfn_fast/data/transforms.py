"""From a sample to the network's training input: scale, crop, flip and border target. The device then normalises it.

Evaluation needs no transform: images go to :func:`normalize` at their own size.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from dfn_fast.data.base import IGNORE
from dfn_fast.data.border import border_targets, check_width
from dfn_fast.data.normalize import PAD_COLOUR
from dfn_fast.errors import ConfigError

MIN_CROP = 32
MIN_SCALE, MAX_SCALE = 0.01, 16  # at 16, a photo of 12 megapixels takes 9 GB


@dataclass(frozen=True)
class TrainTransform:
    """Random scale, crop and flip of image and label together, and the border target of the result.

    If the scaled image is smaller than the crop, it is put at a random place in it; the rest is ``PAD_COLOUR`` in the
    image and 255 in label and border.
    """

    crop: tuple[int, int]  # height, width
    scales: tuple[float, ...]  # one is drawn for each sample
    flip: bool  # mirror every other sample, left to right
    border_width: int  # in pixels of the crop

    def __post_init__(self):
        if min(self.crop) < MIN_CROP:
            raise ConfigError(
                f"crop {self.crop[0]}x{self.crop[1]}: expected at least {MIN_CROP}x{MIN_CROP}, the network's largest "
                "stride; choose a larger crop: smaller images are padded"
            )
        if not self.scales or not all(MIN_SCALE <= scale <= MAX_SCALE for scale in self.scales):
            raise ConfigError(
                f"scales {self.scales}: expected one or more numbers from {MIN_SCALE} to {MAX_SCALE}, such as 0.5 1 1.5"
            )
        check_width(self.border_width)

    def __call__(
        self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``[H, W, 3]`` and ``[H, W]`` uint8 -> image, label and border target of the crop's size, contiguous."""
        # All random numbers are drawn here, in an order that does not depend on the sample.
        scale = self.scales[rng.integers(len(self.scales))]
        place = rng.random(2)
        flip = self.flip and rng.random() < 0.5
        if scale != 1:
            image, label = rescale(image, label, scale)
        image, label = _crop_or_pad(image, label, self.crop, place)
        if flip:
            image, label = cv2.flip(image, 1), cv2.flip(label, 1)
        return image, label, border_targets(label, self.border_width)


def rescale(image: np.ndarray, label: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Resizes both by ``scale``, bilinear and nearest. Pixel ``j`` covers ``[j, j + 1]`` in both."""
    height, width = label.shape
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    # INTER_NEAREST takes the pixel's corner for its centre, which would shift labels by up to half a pixel.
    return image, cv2.resize(label, size, interpolation=cv2.INTER_NEAREST_EXACT)


def _crop_or_pad(
    image: np.ndarray, label: np.ndarray, crop: tuple[int, int], place: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """New arrays of the crop's size. ``place``, in [0, 1) for y and x, chooses uniformly among all positions of the
    crop in the image or of the image in the crop."""
    source, target = [], []
    for size, length, at in zip(label.shape, crop, place, strict=True):
        position = int(at * (abs(size - length) + 1))
        start, offset = (position, 0) if size >= length else (0, position)
        source.append(slice(start, start + length))
        target.append(slice(offset, offset + min(size, length)))
    part = tuple(source)
    if label.shape[0] >= crop[0] and label.shape[1] >= crop[1]:
        return image[part].copy(), label[part].copy()
    padded = np.empty((*crop, 3), np.uint8), np.full(crop, IGNORE, np.uint8)
    padded[0][:] = PAD_COLOUR
    padded[0][tuple(target)], padded[1][tuple(target)] = image[part], label[part]
    return padded
