"""Metrics against loops over pixels written from their definitions, and against cases worked out by hand."""

import math

import numpy as np
import pytest
import torch

from dfn_fast.evaluate.metrics import BorderScore, BoundaryFScore, ConfusionMatrix


def iou_by_loops(labels, predictions, num_classes):
    """Intersection over union as sets of pixels."""
    ious = []
    for k in range(num_classes):
        true = {i for i, (t, _) in enumerate(zip(labels.flat, predictions.flat, strict=True)) if t == k}
        predicted = {
            i for i, (t, p) in enumerate(zip(labels.flat, predictions.flat, strict=True)) if p == k and t != 255
        }
        ious.append(len(true & predicted) / len(true | predicted) if true | predicted else math.nan)
    return np.array(ious)


@pytest.fixture
def maps():
    """Labels with 255 and predictions with a value that is no class; class 4 is in neither."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 3, 255], size=(13, 17)).astype(np.uint8)
    predictions = rng.choice([0, 1, 2, 3, 255], p=[0.4, 0.2, 0.2, 0.1, 0.1], size=(13, 17)).astype(np.uint8)
    return labels, predictions


def test_per_class_iou_is_intersection_over_union(maps):
    confusion = ConfusionMatrix(5)
    confusion.update(*maps)
    expected = iou_by_loops(*maps, 5)
    assert math.isnan(expected[4])
    np.testing.assert_allclose(confusion.per_class_iou, expected, rtol=1e-12)
    assert confusion.mean_iou == pytest.approx(np.mean(expected[:4]), rel=1e-12)


def test_accuracies_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1, 255, 255])
    predictions = np.array([0, 0, 0, 1, 1, 255, 2, 0])
    confusion = ConfusionMatrix(3)
    confusion.update(labels, predictions)
    assert confusion.pixel_accuracy == pytest.approx(4 / 6)
    assert confusion.mean_accuracy == pytest.approx((3 / 4 + 1 / 2) / 2)  # class 2 has no label
    np.testing.assert_allclose(confusion.per_class_iou, [3 / 4, 1 / 3, math.nan])
    np.testing.assert_allclose(confusion.pixel_share, [4 / 6, 2 / 6, 0])


def test_class_that_is_only_predicted_has_iou_zero():
    confusion = ConfusionMatrix(2)
    confusion.update(np.array([0, 0]), np.array([0, 1]))
    np.testing.assert_array_equal(confusion.per_class_iou, [0.5, 0.0])
    assert confusion.mean_iou == 0.25


def test_iou_is_of_the_data_set_not_a_mean_over_images(maps):
    whole, parts, other = ConfusionMatrix(5), ConfusionMatrix(5), ConfusionMatrix(5)
    whole.update(*maps)
    labels, predictions = maps
    parts.update(labels[:3], predictions[:3])
    parts.update(labels[3:9], predictions[3:9])
    other.update(labels[9:], predictions[9:])
    parts.merge(other)
    assert parts.mean_iou == whole.mean_iou
    assert parts.counts.shape == whole.counts.shape == (5, 6)  # whatever the number of images


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.int64, torch.uint8, torch.int16, torch.int64])
def test_any_integer_dtype_gives_the_same_counts(maps, dtype):
    labels, predictions = (np.where(m == 255, 3, m) for m in maps)
    expected = ConfusionMatrix(4)
    expected.update(labels, predictions)
    confusion = ConfusionMatrix(4)
    if isinstance(dtype, torch.dtype):
        confusion.update(torch.from_numpy(labels).to(dtype), torch.from_numpy(predictions).to(dtype))
    else:
        confusion.update(labels.astype(dtype), predictions[:, ::-1].astype(dtype)[:, ::-1])  # negative strides too
    assert torch.equal(confusion.counts, expected.counts)
    assert expected.counts.sum() == labels.size


def test_without_a_pixel_everything_is_nan():
    confusion = ConfusionMatrix(2)
    confusion.update(np.full((2, 2), 255), np.zeros((2, 2), int))
    for value in (confusion.mean_iou, confusion.pixel_accuracy, confusion.mean_accuracy):
        assert math.isnan(value)


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        (np.array([0, 7]), np.array([0, 0]), "neither a class"),
        (np.array([0, -1]), np.array([0, 0]), "neither a class"),
        (np.array([0, 1]), np.array([0]), "shape"),
        (np.array([0.0, 1.0]), np.array([0, 1]), "integers"),
    ],
)
def test_confusion_matrix_refuses_garbage(labels, predictions, message):
    with pytest.raises(ValueError, match=message):
        ConfusionMatrix(3).update(labels, predictions)


def test_confusion_matrices_of_other_sizes_do_not_merge():
    with pytest.raises(ValueError, match="merge"):
        ConfusionMatrix(3).merge(ConfusionMatrix(4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_confusion_matrix_stays_on_the_device(maps):
    confusion, expected = ConfusionMatrix(5), ConfusionMatrix(5)
    confusion.update(*(torch.from_numpy(m).cuda() for m in maps))
    expected.update(*maps)
    assert confusion.counts.is_cuda
    assert torch.equal(confusion.counts.cpu(), expected.counts)


def boundary_by_loops(label, prediction, num_classes, tolerance):
    """The contour F-score of one image without void, pixel by pixel."""
    H, W = label.shape
    limit = tolerance * math.sqrt(H**2 + W**2)

    def contour(classes, k):
        return [
            (y, x)
            for y in range(H)
            for x in range(W)
            if classes[y, x] == k
            and any(
                0 <= v < H and 0 <= u < W and classes[v, u] != k
                for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
            )
        ]

    def matched(points, others):
        near = [min(math.dist(p, q) for q in others) <= limit for p in points]
        return sum(near) / len(near)

    scores = []
    for k in range(num_classes):
        if not ((label == k).any() or (prediction == k).any()):
            continue
        true, predicted = contour(label, k), contour(prediction, k)
        if true and predicted:
            precision, recall = matched(predicted, true), matched(true, predicted)
            scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
        else:
            both = (label == k).any() and (prediction == k).any()
            scores.append(1.0 if both and not true and not predicted else 0.0)
    return sum(scores) / len(scores)


def boundary(label, prediction, num_classes=3, **settings):
    score = BoundaryFScore(num_classes, **settings)
    score.update(np.asarray(label, np.uint8), np.asarray(prediction, np.uint8))
    return score.value


def blobs(seed, height=24, width=31):
    """Blocks of three classes with some noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 3, size=(height // 6 + 1, width // 6 + 1))
    label = np.kron(coarse, np.ones((6, 6), int))[:height, :width]
    return np.where(rng.random(label.shape) < 0.03, 0, label).astype(np.uint8)


@pytest.mark.parametrize("tolerance", [0.0, 0.026, 0.06])  # 0; one pixel but no diagonal; two pixels
def test_boundary_f_score_against_loops(tolerance):
    label = blobs(0)
    prediction = np.where(np.roll(blobs(0), 1, axis=1) == 2, 2, blobs(1))
    expected = boundary_by_loops(label, prediction, 3, tolerance)
    assert 0.05 < expected < 0.98
    assert boundary(label, prediction, tolerance=tolerance) == pytest.approx(expected, rel=1e-12)


def test_boundary_tolerance_is_a_share_of_the_diagonal():
    label = np.zeros((60, 80), np.uint8)  # diagonal 100
    label[:, 40:] = 1
    prediction = np.roll(label, 3, axis=1)
    prediction[:, :3] = 0
    assert boundary(label, prediction, tolerance=0.029) == 0.0
    assert boundary(label, prediction, tolerance=0.03) == 1.0


def test_boundary_of_a_class_that_fills_the_image():
    zeros, ones = np.zeros((8, 8), int), np.ones((8, 8), int)
    half = zeros.copy()
    half[4:] = 1
    assert boundary(zeros, zeros) == 1.0
    assert boundary(zeros, ones) == 0.0
    assert boundary(zeros, half) == 0.0
    assert boundary(half, half) == 1.0


def test_boundary_inside_a_large_void_does_not_count():
    label = np.zeros((60, 80), np.uint8)
    label[:, 40:] = 1
    right = label.copy()
    label[10:40, 10:30] = 255
    wild = right.copy()
    wild[15:35:2, 15:25:3] = 2  # deep inside the void
    assert boundary(label, wild) == boundary(label, right) == 1.0
    wild[50, 60] = 2  # outside of it
    assert boundary(label, wild) < 1.0


def test_the_edge_of_a_large_void_is_no_contour():
    label = np.zeros((60, 80), np.uint8)
    label[:, 30:50], label[:, 50:] = 255, 1
    prediction = np.zeros_like(label)
    assert boundary(label, prediction) == 0.5  # class 0 is on both sides without a contour, class 1 on one side


def test_thin_void_ring_is_a_contour():
    """PASCAL VOC draws five pixels of 255 around an object: its contour is in their middle."""
    yy, xx = np.mgrid[:375, :500]
    radius = np.hypot(yy - 180, xx - 250)
    label = np.select([radius < 97.5, radius < 102.5], [1, 255], 0).astype(np.uint8)
    assert boundary(label, radius < 100) == 1.0
    assert boundary(label, radius < 103.5) == 1.0  # outside the ring, 3.5 from its middle; the tolerance is 4.7
    assert boundary(label, radius < 110) == 0.0
    assert boundary(label, radius < 90) == 0.0


def drawn_over(label, void):
    """``label`` with the class of the nearest other pixel, by Euclidean distance, wherever ``void``."""
    known = np.argwhere(~void)
    filled = label.copy()
    for pixel in np.argwhere(void):
        filled[tuple(pixel)] = label[tuple(known[np.argmin(((known - pixel) ** 2).sum(axis=1))])]
    return filled


@pytest.mark.parametrize("width", [5, 7, 9])  # the tolerance is 5: one to just under two of it
def test_a_void_band_between_one_and_two_tolerances_is_a_contour(width):
    yy, xx = np.mgrid[:60, :80]  # diagonal 100
    sides = (2 * yy + xx > 90).astype(np.uint8)  # an oblique contour
    void = abs(2 * yy + xx - 90) / math.sqrt(5) < width / 2
    label = np.where(void, 255, sides).astype(np.uint8)
    for shift in (0, 3, 8):
        prediction = (2 * yy + xx > 90 + shift * math.sqrt(5)).astype(np.uint8)
        expected = boundary_by_loops(drawn_over(sides, void), prediction, 2, 0.05)
        assert boundary(label, prediction, num_classes=2, tolerance=0.05) == pytest.approx(expected, rel=1e-9)
        assert expected == 1.0 if shift < 5 else expected < 0.1


def test_a_void_band_wider_than_two_tolerances_is_no_contour():
    label = np.zeros((60, 80), np.uint8)
    label[:, 30:43], label[:, 43:] = 255, 1  # 13 pixels; the tolerance is 5, so three in the middle are ignored
    inside, beside, far = (np.repeat(np.arange(80)[None] >= x, 60, axis=0).astype(np.uint8) for x in (36, 41, 50))
    assert boundary(label, inside, num_classes=2, tolerance=0.05) == 1.0
    # Within the tolerance of the band's middle, but that is no contour of the label.
    assert boundary(label, beside, num_classes=2, tolerance=0.05) == 0.0
    assert boundary(label, far, num_classes=2, tolerance=0.05) == 0.0


def test_boundary_is_a_mean_over_images_and_merges():
    zeros, ones = np.zeros((8, 8), np.uint8), np.ones((8, 8), np.uint8)
    score, other = BoundaryFScore(2), BoundaryFScore(2)
    score.update(zeros, zeros)
    score.update(np.full((8, 8), 255, np.uint8), zeros)  # nothing to judge: not an image
    other.update(zeros, ones)
    other.update(ones, ones)
    score.merge(other)
    assert score.value == pytest.approx(2 / 3)
    assert math.isnan(BoundaryFScore(2).value)
    with pytest.raises(ValueError, match="merge"):
        score.merge(BoundaryFScore(2, tolerance=0.1))


def test_border_score_finds_the_best_threshold():
    rng = np.random.default_rng(0)
    targets = rng.choice([0, 1, 255], p=[0.7, 0.2, 0.1], size=(40, 50)).astype(np.uint8)
    probabilities = np.clip(0.3 * (targets == 1) + 0.7 * rng.random((40, 50)), 0, 1).astype(np.float32)
    score = BorderScore()
    score.update(targets[:15], probabilities[:15])
    rest = BorderScore()
    rest.update(targets[15:], probabilities[15:])
    score.merge(rest)

    best = (0.0,) * 4
    valid = targets != 255
    for i in range(1, 100):
        predicted = probabilities >= i / 100
        hits = (predicted & (targets == 1)).sum()
        precision = hits / max((predicted & valid).sum(), 1)
        recall = hits / (targets == 1).sum()
        f_score = 2 * precision * recall / max(precision + recall, 1e-9)
        if f_score > best[3] + 1e-12:
            best = (i / 100, precision, recall, f_score)
    assert 0.3 < best[3] < 0.95
    assert tuple(score.best().values()) == pytest.approx(best)


def test_border_score_counts_a_probability_at_the_threshold():
    score = BorderScore()
    score.update(np.array([1, 0]), np.array([0.99, 0.98]))
    assert score.best() == {"threshold": 0.99, "precision": 1.0, "recall": 1.0, "f_score": 1.0}


def test_border_score_without_borders_is_nan_and_refuses_nan():
    score = BorderScore()
    score.update(np.zeros(4, np.uint8), np.full(4, 0.5))
    assert all(math.isnan(value) for value in score.best().values())
    with pytest.raises(ValueError, match="finite"):
        score.update(np.zeros(1, np.uint8), np.array([math.nan]))
