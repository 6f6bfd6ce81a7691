"""Border targets, which the Border Network learns (Yu et al., CVPR 2018, section 3.2): Canny edges of a label map."""

from collections.abc import Sequence

import cv2
import numpy as np

from dfn_fast.errors import ConfigError, DataError

MAX_WIDTH = 255  # pixels: a wider border is none, and the time of a dilation grows with its width


def border_targets(label: np.ndarray, width: int = 7, ignore_index: int = 255) -> np.ndarray:
    """1 on the borders between classes, 0 elsewhere, 255 where the label is ``ignore_index``.

    Ignored pixels first take the nearest class. So they have no border against their surroundings, and the ring that
    PASCAL VOC draws around objects has its border in its middle. Then the Canny edges of each class's mask are joined,
    so that class numbers do not matter, and dilated by an ellipse.

    Args:
        label: ``[H, W]`` uint8 class ids, any size from 1 x 1.
        width: of a border in pixels, odd, at most ``MAX_WIDTH``; 1 leaves Canny's edges as they are.

    Returns:
        ``[H, W]`` uint8 in {0, 1, 255}. Two pixels that touch and differ have an edge within one pixel of them.

    Raises:
        ConfigError: the width is not odd and positive, or too large.
        DataError: the label is not a two-dimensional, non-empty uint8 array.
    """
    check_width(width)
    if not isinstance(label, np.ndarray) or label.dtype != np.uint8 or label.ndim != 2 or not label.size:
        got = f"{label.dtype} {list(label.shape)}" if isinstance(label, np.ndarray) else type(label).__name__
        raise DataError(f"border targets: expected a label map of dtype uint8 and shape [H, W], got {got}")
    void = label == ignore_index
    if void.all():
        return np.full_like(label, 255)
    edges = _class_edges(fill_with_nearest(label, void) if void.any() else label)
    if width > 1:
        edges = cv2.dilate(edges, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width)))
    edges[void] = 255
    return edges


def check_width(width: int) -> None:
    """Raises :class:`ConfigError` unless ``width`` is odd, positive and at most ``MAX_WIDTH``."""
    if not 1 <= width <= MAX_WIDTH or width % 2 == 0:
        raise ConfigError(f"border width: expected an odd number of pixels (1, 3, 5 ... {MAX_WIDTH}), got {width}")


def fill_with_nearest(label: np.ndarray, void: np.ndarray) -> np.ndarray:
    """``label`` with every ``void`` pixel set to the class of the nearest other pixel; there must be at least one."""
    mask = void.astype(np.uint8)
    box = around(cv2.boundingRect(mask), 1)  # every void pixel's nearest valid pixel lies in it
    label, mask = label.copy(), mask[box]
    _, nearest = cv2.distanceTransformWithLabels(mask, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL)
    inside, valid = label[box], mask == 0
    class_of = np.zeros(nearest.max() + 1, np.uint8)
    class_of[nearest[valid]] = inside[valid]
    inside[:] = class_of[nearest]
    return label


def _class_edges(label: np.ndarray) -> np.ndarray:
    """``[H, W]`` uint8, 1 on the edges of any class."""
    edges = np.zeros_like(label)
    for class_id in np.flatnonzero(np.bincount(label.ravel())):
        mask = (label == class_id).view(np.uint8) * np.uint8(255)
        # Sobel reaches one pixel past the mask and non-maximum suppression one more: the rest has no edge.
        box = around(cv2.boundingRect(mask), 2)
        edges[box] |= cv2.Canny(mask[box], 1, 1, apertureSize=3, L2gradient=True) & 1
    # Canny is blind where structures of a pixel or two cancel in its Sobel filter, as on a checkerboard.
    missed = _touches_another(label) & (cv2.dilate(edges, np.ones((3, 3), np.uint8)) == 0)
    return edges | missed


def _touches_another(label: np.ndarray) -> np.ndarray:
    """``[H, W]`` uint8, 1 where the pixel above, below, left or right is of another class."""
    touches = np.zeros_like(label)
    down, right = label[1:] != label[:-1], label[:, 1:] != label[:, :-1]
    touches[1:] |= down
    touches[:-1] |= down
    touches[:, 1:] |= right
    touches[:, :-1] |= right
    return touches


def around(rectangle: Sequence[int], margin: int) -> tuple[slice, slice]:
    """The slices of OpenCV's ``(x, y, width, height)`` with a margin, cut off at the image's top and left side."""
    x, y, width, height = rectangle
    return slice(max(y - margin, 0), y + height + margin), slice(max(x - margin, 0), x + width + margin)
