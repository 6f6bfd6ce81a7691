"""Sliding windows and the authors' rule against the same computation in plain float64 loops."""

import os
import threading

import cv2
import numpy as np
import pytest
import torch

from dfn_fast.inference import combine
from dfn_fast.inference.predictor import Predictor
from dfn_fast.inference.windows import WindowScores, window_starts
from dfn_fast.network.reference import ReferenceDFN
from support.plain_predictions import K, gaussian, normalised, resized, scaled, small_scores, softmax, starts


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("weight", ["count", "gaussian"])
@pytest.mark.parametrize("flip", [False, True])
def test_windows_are_averaged(model, picture, flip, weight, batch):
    image = picture(60, 81)  # at scale 1.5: 90 x 122 (121.5 rounded to even), neither a multiple of the stride
    window, stride, scale = (48, 64), (32, 43), 1.5  # windows overlap by a third
    x = normalised(scaled(image, scale))
    H, W = x.shape[:2]
    assert (H, W) == (90, 122)
    weights = np.ones(window) if weight == "count" else np.outer(*map(gaussian, window))
    expected = []
    for mirrored in (False, True) if flip else (False,):
        total, count, tiles = np.zeros((K, H, W)), np.zeros((H, W)), np.zeros((H, W))
        for top in starts(H, window[0], stride[0]):
            for left in starts(W, window[1], stride[1]):
                tile = x[top : top + window[0], left : left + window[1]]
                if mirrored:
                    scores = resized(small_scores(model, tile[:, ::-1])[..., ::-1], window)
                else:
                    scores = resized(small_scores(model, tile), window)
                total[:, top : top + window[0], left : left + window[1]] += weights * scores
                count[top : top + window[0], left : left + window[1]] += weights
                tiles[top : top + window[0], left : left + window[1]] += 1
        assert tiles.min() == 1
        assert tiles.max() >= 4
        expected.append(softmax(resized(total / count, (60, 81))))
    settings = {"scales": (scale,), "flip": flip, "window": window, "window_weight": weight, "batch": batch}
    predictor = Predictor(model, **settings)
    np.testing.assert_allclose(predictor.probabilities(image), np.mean(expected, axis=0), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(predictor(image), np.mean(expected, axis=0).argmax(0))


@pytest.mark.parametrize("overlap", [1 / 3, 2 / 3])
def test_a_window_moves_by_whole_thirds(overlap):
    """In floating point ``(1 - 1 / 3) * window`` is a little more than the whole number, or a little less."""
    for window in range(33, 1200, 3):
        starts = window_starts(5 * window, window, overlap)
        assert starts[1] == round((1 - overlap) * 3) * window // 3
        assert starts[-1] == 4 * window


@pytest.mark.parametrize("height", [320, 3200])
def test_a_tall_image_keeps_few_rows_of_windows(height):
    """However tall it is, and each row of windows is scored once."""
    scored, kept = [], []
    tiles = WindowScores(
        lambda x: scored.append(len(x)) or x[:, :2, ::4, ::4],
        torch.zeros(1, 3, height, 96), (48, 48), 1 / 3, flip=False, batch=2,
    )  # fmt: skip
    for begin in range(0, height, 20):
        tiles.rows(begin, begin + 20)
        kept.append(len(tiles.kept))
    assert max(kept) == 3  # a band of 20 rows touches no more, as a new one begins every 32
    assert sum(scored) == len(tiles.tops) * len(tiles.lefts)


@pytest.mark.parametrize("settings", [{"window": 40}, {"window": 36, "rule": "torchseg"}], ids=["mean", "torchseg"])
def test_bands_are_the_whole(model, picture, settings, monkeypatch):
    """Assembling a few rows at a time, as for large images, gives the whole result."""
    image, settings = picture(60, 47), {"scales": (0.7, 1, 1.4), "flip": True, **settings}
    whole = Predictor(model, **settings).probabilities(image)
    for rows in (1, 7):
        monkeypatch.setattr(combine, "BAND_BYTES", rows * 4 * K * 47 * 2)
        torch.testing.assert_close(Predictor(model, **settings).probabilities(image), whole, rtol=0, atol=1e-6)


def test_a_large_image_takes_bounded_memory(monkeypatch):
    """A strip of a large image with 150 classes, whose probabilities alone would take 370 MB.

    Memory beyond the network's own does not grow with the height. The network is a stand-in that needs almost none.
    """
    monkeypatch.setattr(combine, "BAND_BYTES", 1 << 23)
    image = np.zeros((600, 1024, 3), np.uint8)
    model = ReferenceDFN(150, backbone="resnet18", channels=8, border=False)
    predictor = Predictor(model, window=256, amp="off", batch=4)
    predictor.engine.scores = lambda x: x[:, :1, ::4, ::4] * torch.arange(150.0).view(1, 150, 1, 1)
    assert predictor.network.num_classes == 150  # built before memory is measured
    with Peak() as peak:
        labels = predictor(image)
    assert labels.shape == (600, 1024)
    assert peak.bytes < 2.5e8, f"{peak.bytes / 1e9:.2f} GB"


class Peak:
    """Measures the peak of resident memory in this context, above that at its start."""

    def __enter__(self):
        self.before, self.most, self.stop = self.now(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.stop.wait(0.005):
            self.most = max(self.most, self.now())

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()
        self.bytes = self.most - self.before

    @staticmethod
    def now():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_a_window_of_the_images_size_changes_nothing(model, picture, scale):
    image = picture(48, 64)
    window = (round(48 * scale), round(64 * scale))
    whole = Predictor(model, scales=(scale,), flip=True).probabilities(image)
    windowed = Predictor(model, scales=(scale,), flip=True, window=window)
    torch.testing.assert_close(windowed.probabilities(image), whole, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(windowed(image), whole.argmax(0))


@pytest.mark.parametrize("window", [64, (64, 48), (40, 500)])
def test_a_window_larger_than_the_image_changes_nothing(model, picture, window):
    """On one side or on both: each side of the window is clipped to that of the image."""
    image = picture(40, 45)
    whole = Predictor(model, scales=(1, 0.8), flip=True).probabilities(image)
    windowed = Predictor(model, scales=(1, 0.8), flip=True, window=window).probabilities(image)
    torch.testing.assert_close(windowed, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("flip", [False, True])
def test_torchseg_rule(model, picture, flip):
    """Sums over windows, products over mirror images, sums over scales, cv2's resize, black beside large images."""
    image = picture(49, 91)
    window, stride = 64, 43
    total = np.zeros((49, 91, K))
    for scale in (0.5, 1.0, 1.5):
        x = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        H, W = x.shape[:2]
        top = left = 0
        if max(H, W) <= window:  # 24 x 46
            top, left = (window - H) // 2, (window - W) // 2
            padded = np.zeros((window, window, 3))
            padded[top : top + H, left : left + W] = normalised(x)
        else:  # 49 x 91 is padded to 64 x 91; 74 x 136 is not
            top = max(window - H, 0) // 2
            canvas = np.zeros((max(H, window), max(W, window), 3), np.uint8)
            canvas[top : top + H, left : left + W] = x
            padded = normalised(canvas)
        summed = np.zeros((K, *padded.shape[:2]))
        for y in starts(padded.shape[0], window, stride):
            for x0 in starts(padded.shape[1], window, stride):
                tile = padded[y : y + window, x0 : x0 + window]
                product = softmax(resized(small_scores(model, tile), (window, window)))
                if flip:
                    mirrored = resized(small_scores(model, tile[:, ::-1]), (window, window))
                    product = product * softmax(mirrored)[..., ::-1]
                summed[:, y : y + window, x0 : x0 + window] += product
        inside = summed[:, top : top + H, left : left + W].transpose(1, 2, 0)
        total += cv2.resize(np.ascontiguousarray(inside), (91, 49), interpolation=cv2.INTER_LINEAR)
    predictor = Predictor(model, scales=(0.5, 1, 1.5), flip=flip, window=window, rule="torchseg")
    expected = total / total.sum(2, keepdims=True)
    np.testing.assert_allclose(predictor.probabilities(image), expected.transpose(2, 0, 1), rtol=0, atol=2e-6)


def test_torchseg_windows_are_of_512_unless_told(model):
    assert Predictor(model, rule="torchseg").settings()["window"] == [512, 512]
