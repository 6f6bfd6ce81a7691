"""Arrays as users have them: mirrored, in another library's memory order, or read-only. No public call may misread,
refuse or overwrite one."""

import numpy as np
import pytest
import torch

from dfn_fast.data.base import Sample
from dfn_fast.data.border import border_targets
from dfn_fast.data.loader import AugmentedSamples, SampleKey, collate
from dfn_fast.data.transforms import TrainTransform
from dfn_fast.evaluate.evaluation import evaluate
from dfn_fast.evaluate.metrics import BorderScore, BoundaryFScore, ConfusionMatrix
from dfn_fast.inference.predictor import Predictor
from dfn_fast.media.overlays import colorize, overlay
from support.networks import random_dfn
from support.tiny_resnet import tiny_backbones

CLASSES = 3
PALETTE = np.arange(3 * CLASSES, dtype=np.uint8).reshape(CLASSES, 3)


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


# Each returns the values of its argument in another layout.
LAYOUTS = {
    "left to right": lambda x: x[:, ::-1].copy()[:, ::-1],
    "upside down": lambda x: x[::-1].copy()[::-1],
    "last first": lambda x: x[..., ::-1].copy()[..., ::-1],
    "Fortran": np.asfortranarray,
    "read-only": read_only,
    "every other": lambda x: x.repeat(2, 0).repeat(2, 1)[::2, ::2],
    "one row for all": lambda x: np.broadcast_to(x[:1], x.shape),
}
pytestmark = [pytest.mark.parametrize("layout", LAYOUTS), pytest.mark.filterwarnings("error")]


@pytest.fixture(scope="module")
def model():
    with tiny_backbones():
        return random_dfn(CLASSES, stem="conv7", channels=8, border_channels=4).float().eval()


def image_and_label(layout: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 37, 3), np.uint8)
    label = rng.integers(0, CLASSES, (5, 5), np.uint8).repeat(8, 0).repeat(8, 1)[:, :37]
    return LAYOUTS[layout](image), LAYOUTS[layout](label)


def plain(x: np.ndarray) -> np.ndarray:
    """A copy of x as most arrays are: in C order and writable."""
    return np.array(x, order="C")


@pytest.mark.parametrize("settings", [{}, {"flip": True, "scales": (0.75, 1)}, {"window": 32}, {"bucket": 16}], ids=str)
def test_predictor(model, layout, settings):
    image, _ = image_and_label(layout)
    before = image.copy()
    predictor = Predictor(model, amp="off", **settings)
    expected = predictor(plain(image))
    assert expected.max() > 0
    assert np.array_equal(predictor(image), expected)
    assert all(np.array_equal(x, expected) for x in predictor([image, plain(image)]))
    assert np.array_equal(image, before)


def test_the_predictors_other_calls(model, layout):
    image, _ = image_and_label(layout)
    predictor = Predictor(model, amp="off")
    assert torch.equal(predictor.probabilities(image), predictor.probabilities(plain(image)))
    assert np.array_equal(predictor.border(image), predictor.border(plain(image)))


def test_metrics(layout):
    _, label = image_and_label(layout)
    prediction, probability = LAYOUTS[layout](plain(label)[::-1]), LAYOUTS[layout](plain(label) / np.float32(CLASSES))
    scores = []
    for kind in (lambda x: x, plain):
        confusion, contours, border = ConfusionMatrix(CLASSES), BoundaryFScore(CLASSES), BorderScore()
        confusion.update(kind(label), kind(prediction))
        contours.update(kind(label), kind(prediction))
        border.update(border_targets(kind(label), 3), kind(probability))
        scores.append((confusion.mean_iou, contours.value, border.best()))
    assert scores[0] == scores[1]


def test_pictures(layout):
    image, label = image_and_label(layout)
    assert np.array_equal(colorize(label, PALETTE), colorize(plain(label), PALETTE))
    assert np.array_equal(overlay(image, label, PALETTE), overlay(plain(image), plain(label), PALETTE))


class OneImage:
    """A user's own data set with one image, which may have any memory layout."""

    name, split, classes = "mine", "val", ("a", "b", "c")
    num_classes = CLASSES

    def __init__(self, image: np.ndarray, label: np.ndarray):
        self.sample = Sample(image, label, "it")

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        return self.sample


@pytest.mark.parametrize("scales", [(1.0,), (0.75, 1.5)])
def test_batches_of_a_users_own_data_set(layout, scales):
    image, label = image_and_label(layout)
    batches = []
    for arrays in ((image, label), (plain(image), plain(label))):
        samples = AugmentedSamples(OneImage(*arrays), TrainTransform((32, 32), scales, True, 3), 0, torch.zeros(1, 3))
        batches.append(collate([samples[SampleKey(0, 0)], samples[SampleKey(1, 0)]]))
    assert all(torch.equal(one, other) for one, other in zip(batches[0][:3], batches[1][:3], strict=True))


def test_evaluation_of_a_users_own_data_set(model, layout):
    image, label = image_and_label(layout)
    predictor = Predictor(model, amp="off")
    reports = [evaluate(predictor, OneImage(*x), border=True) for x in ((image, label), (plain(image), plain(label)))]
    assert reports[0].summary() == reports[1].summary()
