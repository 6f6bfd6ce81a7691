"""How good a segmentation is: IoU and accuracy, F-score of the contours, F-score of the Border Network.

Each metric takes one image (or a batch of pixels) at a time with ``update`` and keeps only sums: its memory does not
grow with the data set. ``merge`` adds the sums of another, so parts of a data set can be scored separately.
"""

import math

import cv2
import numpy as np
import torch
from torch import Tensor

from dfn_fast.data.border import fill_with_nearest
from dfn_fast.media.images import IGNORE


class ConfusionMatrix:
    """Pixel counts of a whole data set by label and prediction. mIoU comes from them, not from a mean over images.

    ``counts`` is ``[K, K + 1]`` int64: row = label, column = predicted class. The last column counts predictions that
    are not a class (255, K and above, negative): they are wrong for their label, and count for no other class. The
    counts begin on the CPU and move to the device of the labels.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)

    def update(self, labels: np.ndarray | Tensor, predictions: np.ndarray | Tensor) -> None:
        """Adds the pixels of ``labels`` and ``predictions``, of one shape and any integer dtype; label 255 is ignored.

        Raises ValueError if the shapes differ, a dtype is not an integer, or a label is neither a class nor 255.
        """
        true, predicted = _integers(labels, "labels"), _integers(predictions, "predictions")
        if true.shape != predicted.shape:
            raise ValueError(f"labels {list(true.shape)} and predictions {list(predicted.shape)} differ in shape")
        K = self.num_classes
        true, predicted = true.flatten(), predicted.to(true.device).flatten()
        valid = true != IGNORE
        true, predicted = true[valid], predicted[valid]
        if ((true < 0) | (true >= K)).any():
            raise ValueError(f"labels hold a value that is neither a class 0..{K - 1} nor {IGNORE}")
        predicted = torch.where((predicted < 0) | (predicted >= K), K, predicted)
        pixels = torch.bincount(true * (K + 1) + predicted, minlength=K * (K + 1))
        self.counts = self.counts.to(true.device) + pixels.view(K, K + 1)

    def merge(self, other: "ConfusionMatrix") -> None:
        """Adds the counts of ``other``, which must have the same number of classes."""
        if other.num_classes != self.num_classes:
            raise ValueError(f"cannot merge {other.num_classes} classes into {self.num_classes}")
        self.counts = self.counts + other.counts.to(self.counts.device)

    @property
    def per_class_iou(self) -> np.ndarray:
        """``[K]`` float64: a class's pixels in both maps over those in either; nan if it is in neither."""
        correct, labelled, predicted = self._totals()
        return _ratio(correct, labelled + predicted - correct)

    @property
    def mean_iou(self) -> float:
        """The mean of ``per_class_iou`` over classes that are not nan; nan if there are no pixels."""
        return _mean(self.per_class_iou)

    @property
    def pixel_accuracy(self) -> float:
        """The share of pixels predicted correctly; nan if there are no pixels."""
        correct, labelled, _ = self._totals()
        return float(_ratio(correct.sum(), labelled.sum()))

    @property
    def mean_accuracy(self) -> float:
        """The share of each class's pixels predicted correctly, averaged over the classes in the labels."""
        correct, labelled, _ = self._totals()
        return _mean(_ratio(correct, labelled))

    @property
    def pixel_share(self) -> np.ndarray:
        """``[K]`` float64: the share of each class among the labelled pixels."""
        labelled = self._totals()[1]
        return _ratio(labelled, labelled.sum())

    def _totals(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels by class: correct, labelled, predicted."""
        counts = self.counts.cpu().numpy()
        return counts.diagonal(), counts.sum(axis=1), counts[:, :-1].sum(axis=0)


class BoundaryFScore:
    """F-score of the contours (Csurka et al., *What is a good evaluation measure for semantic segmentation?*, BMVC
    2013; the contour measure of DAVIS), averaged over the classes of an image and then over images.

    The contour of a class is its pixels with another class above, below, left or right; the edge of the image is not
    a contour. Precision is the share of predicted contour pixels within ``tolerance`` times the image's diagonal of a
    labelled one, recall the reverse, ``F = 2 P R / (P + R)``. Classes in the labels or in the prediction count. If only
    one side has a contour, F is 0. If neither has (the class fills the image), F is 1 if the class is on both sides,
    else 0.

    Pixels labelled 255 are ignored, and no contour runs along them. But a void band narrower than twice the tolerance
    is a drawn contour, such as the ring around PASCAL VOC's objects: its pixels first take the nearest class.
    """

    def __init__(self, num_classes: int, tolerance: float = 0.0075):
        self.num_classes, self.tolerance = num_classes, tolerance
        self.total, self.images = 0.0, 0

    def update(self, label: np.ndarray, prediction: np.ndarray) -> None:
        """Adds one image: two ``[H, W]`` uint8 maps. An image whose label is 255 everywhere is ignored."""
        if label.ndim != 2 or label.shape != prediction.shape:
            raise ValueError(f"expected two maps [H, W] of one shape, got {label.shape} and {prediction.shape}")
        distance = self.tolerance * math.hypot(*label.shape)
        void = label == IGNORE
        if void.all():
            return
        if void.any():
            depth = cv2.distanceTransform(void.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
            label, void = fill_with_nearest(label, void), depth > distance
        scores = []
        for class_id in range(self.num_classes):
            true, predicted = (label == class_id) & ~void, (prediction == class_id) & ~void
            if true.any() or predicted.any():
                scores.append(_contour_f_score(true, predicted, void, distance))
        self.total += sum(scores) / len(scores)
        self.images += 1

    def merge(self, other: "BoundaryFScore") -> None:
        """Adds the images of ``other``, of the same classes and tolerance."""
        if (other.num_classes, other.tolerance) != (self.num_classes, self.tolerance):
            raise ValueError("cannot merge boundary F-scores of other classes or another tolerance")
        self.total += other.total
        self.images += other.images

    @property
    def value(self) -> float:
        """The mean over images; nan if there are none."""
        return self.total / self.images if self.images else math.nan


def _contour_f_score(true: np.ndarray, predicted: np.ndarray, void: np.ndarray, distance: float) -> float:
    """F-score of one class's contour in one image, by :class:`BoundaryFScore`'s definition.

    ``true``, ``predicted`` and ``void`` are ``[H, W]`` bool, the first two False where void; ``distance`` in pixels.
    """
    true_contour, predicted_contour = contour(true, void), contour(predicted, void)
    if not (true_contour.any() and predicted_contour.any()):
        neither = not true_contour.any() and not predicted_contour.any()
        return float(neither and true.any() and predicted.any())
    # The box around both contours holds everything that is measured.
    x, y, width, height = cv2.boundingRect((true_contour | predicted_contour).view(np.uint8))
    box = slice(y, y + height), slice(x, x + width)
    true_contour, predicted_contour = true_contour[box], predicted_contour[box]
    precision = np.mean(_distance_to(true_contour)[predicted_contour] <= distance)
    recall = np.mean(_distance_to(predicted_contour)[true_contour] <= distance)
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def contour(inside: np.ndarray, void: np.ndarray) -> np.ndarray:
    """``[H, W]`` bool: pixels of ``inside`` beside one that is neither inside nor void."""
    outside = ~(inside | void)
    beside = np.zeros_like(inside)
    beside[1:] |= outside[:-1]
    beside[:-1] |= outside[1:]
    beside[:, 1:] |= outside[:, :-1]
    beside[:, :-1] |= outside[:, 1:]
    return inside & beside


def _distance_to(pixels: np.ndarray) -> np.ndarray:
    """``[H, W]`` float32: the Euclidean distance in pixels to the nearest of ``pixels`` (bool, at least one set)."""
    return cv2.distanceTransform((~pixels).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


class BorderScore:
    """Precision, recall and F-score of border probabilities at the threshold that gives the best F over a data set.

    A pixel is predicted a border if its probability is at least the threshold; thresholds are 0.01, 0.02 ... 0.99.
    Pixels are compared one by one, without a tolerance: the width of the targets is a tolerance.
    """

    THRESHOLDS = np.arange(1, 100) / 100

    def __init__(self):
        # [2, 100]: pixels by target (0, 1) and by the number of thresholds that they reach
        self.counts = np.zeros((2, len(self.THRESHOLDS) + 1), np.int64)

    def update(self, targets: np.ndarray, probabilities: np.ndarray) -> None:
        """Adds one image: ``targets`` in {0, 1, 255} and ``probabilities`` in 0..1, of one shape; 255 is ignored."""
        if targets.shape != probabilities.shape:
            raise ValueError(f"targets {targets.shape} and probabilities {probabilities.shape} differ in shape")
        if not np.isfinite(probabilities).all():
            raise ValueError("border probabilities are not finite")
        for target in (0, 1):
            reached = np.digitize(probabilities[targets == target], self.THRESHOLDS)
            self.counts[target] += np.bincount(reached, minlength=self.counts.shape[1])

    def merge(self, other: "BorderScore") -> None:
        self.counts = self.counts + other.counts

    def best(self) -> dict[str, float]:
        """The best ``threshold``, with its ``precision``, ``recall`` and ``f_score``; nan if no border was seen."""
        false, true = self.counts[:, ::-1].cumsum(axis=1)[:, -2::-1]  # at each threshold: pixels that reach it
        borders = self.counts[1].sum()
        f_score = _ratio(2 * true, true + false + borders)
        i = int(np.argmax(f_score)) if borders else 0
        recall = _ratio(true[i], borders)
        return {
            "threshold": float(self.THRESHOLDS[i]) if borders else math.nan,
            "precision": float(_ratio(true[i], true[i] + false[i])) if borders else math.nan,
            "recall": float(recall),
            "f_score": float(f_score[i]) if borders else math.nan,
        }


def _integers(values: np.ndarray | Tensor, what: str) -> Tensor:
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.require(values, requirements=["C", "W"]))
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{what}: expected integers, got {tensor.dtype}")
    return tensor.long()


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """``part / whole``, nan where ``whole`` is 0."""
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole != 0)


def _mean(values: np.ndarray) -> float:
    """The mean of the values that are not nan; nan if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan
