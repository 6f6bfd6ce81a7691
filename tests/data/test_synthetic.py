"""The synthetic scenes: reproducible, held out for validation, and hard for the stated reasons."""

import pickle

import cv2
import numpy as np
import pytest

from dfn_fast.data.datasets.synthetic import LENGTHS, SyntheticScenes
from dfn_fast.errors import ConfigError

LOOK_ALIKES = [("sky", "water"), ("meadow", "crop"), ("boat", "wagon")]  # told by ripples, by rows, by what is around
GROUNDS = ("water",), ("meadow", "crop")


@pytest.fixture(scope="module")
def scenes():
    return [list(SyntheticScenes(split, length=60)) for split in LENGTHS]


def same(left, right):
    return np.array_equal(left.image, right.image) and np.array_equal(left.label, right.label)


@pytest.mark.parametrize("size", [(96, 128), (64, 64), (131, 97)])
def test_a_scene_is_a_sample(size):
    dataset = SyntheticScenes("train", size=size, length=4)
    assert len(dataset) == len(list(dataset)) == 4
    for sample in dataset:
        assert sample.image.shape == (*size, 3)
        assert sample.label.shape == size
        assert sample.image.dtype == sample.label.dtype == np.uint8
        assert sample.image.flags.c_contiguous


def test_names_classes_and_palette():
    dataset = SyntheticScenes("val")
    assert len(dataset) == LENGTHS["val"]
    assert dataset.name == "synthetic"
    names = dataset.names()
    assert len(set(names)) == len(dataset)
    assert [dataset[i].name for i in (0, 5)] == [names[0], names[5]]
    assert not set(names) & set(SyntheticScenes("train").names())
    assert dataset.num_classes == len(set(dataset.classes)) >= 6
    assert dataset.palette.shape == (dataset.num_classes, 3)
    assert dataset.palette.dtype == np.uint8
    assert len(np.unique(dataset.palette, axis=0)) == dataset.num_classes


def test_a_scene_follows_from_seed_split_and_index():
    dataset = SyntheticScenes("train", seed=3)
    in_order = [dataset[i] for i in range(4)]
    again = pickle.loads(pickle.dumps(SyntheticScenes("train", seed=3, length=10)))
    assert all(same(again[i], in_order[i]) for i in (2, 0, 3, 1))
    others = [SyntheticScenes("train", seed=4), SyntheticScenes("val", seed=3)]
    assert not any(same(other[i], in_order[i]) for other in others for i in range(4))


def test_validation_is_held_out(scenes):
    train, val = ({scene.image.tobytes() for scene in split} for split in scenes)
    assert len(train) == len(val) == 60
    assert not train & val


def test_every_class_and_255_occur(scenes):
    for split in scenes:
        labels = np.stack([scene.label for scene in split])
        classes = len(SyntheticScenes.classes)
        assert set(np.unique(labels)) == {*range(classes), 255}
        for class_id in range(classes):
            assert (labels == class_id).mean() > 0.01
            assert (labels == class_id).any(axis=(1, 2)).mean() > 0.3
        assert 0.005 < (labels == 255).mean() < 0.1
        # Patches are in a third of the scenes, outlines in most.
        assert (labels == 255).any(axis=(1, 2)).mean() > 0.6


def test_colour_alone_does_not_tell(scenes):
    """The best guess from a pixel's colour, in 12 steps a channel, stays far from what the network reaches."""
    train, val = scenes

    def colours_and_classes(split):
        steps = np.stack([scene.image for scene in split]).astype(np.int64) * 12 // 256
        label = np.stack([scene.label for scene in split])
        return (steps @ [144, 12, 1])[label != 255], label[label != 255]

    classes = len(SyntheticScenes.classes)
    colour, label = colours_and_classes(train)
    seen = np.zeros((12**3, classes))
    np.add.at(seen, (colour, label), 1 / np.bincount(label)[label])
    colour, label = colours_and_classes(val)
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (label, seen.argmax(axis=1)[colour]), 1)
    hits = np.diag(confusion)
    mean_iou = (hits / (confusion.sum(axis=0) + confusion.sum(axis=1) - hits)).mean()
    assert mean_iou < 0.4


@pytest.mark.parametrize("pair", LOOK_ALIKES)
def test_look_alikes_have_the_same_colours(scenes, pair):
    pixels = np.concatenate([scene.image.reshape(-1, 3) for split in scenes for scene in split]).astype(float)
    labels = np.concatenate([scene.label.ravel() for split in scenes for scene in split])
    first, second = (pixels[labels == SyntheticScenes.classes.index(name)] for name in pair)
    spread = np.minimum(first.std(axis=0), second.std(axis=0))
    assert (abs(first.mean(axis=0) - second.mean(axis=0)) < 0.4 * spread).all()


def test_an_index_outside_is_an_index_error():
    dataset = SyntheticScenes("train", length=3)
    for index in (3, -1):
        with pytest.raises(IndexError):
            dataset[index]


def ground_around(scene, class_id):
    """The water's share of the ground within three pixels below and beside the pixels of a class."""
    beside = np.zeros((7, 7), np.uint8)
    beside[:4] = 1  # reaches downwards and sideways, not up
    near = cv2.dilate((scene.label == class_id).astype(np.uint8), beside) > 0
    names = SyntheticScenes.classes
    water, land = ((near & np.isin(scene.label, [names.index(n) for n in group])).sum() for group in GROUNDS)
    return water / (water + land) if water + land else None


def test_a_boat_is_on_water_and_a_wagon_on_land(scenes):
    for name, expected in (("boat", 1), ("wagon", 0)):
        shares = [ground_around(scene, SyntheticScenes.classes.index(name)) for split in scenes for scene in split]
        shares = [share for share in shares if share is not None]
        assert len(shares) > 60
        assert np.mean([abs(share - expected) < 0.5 for share in shares]) > 0.85  # others hide what they stand on


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"split": "test"}, "split 'test'"),
        ({"size": (16, 128)}, "16x128"),
        ({"length": 0}, "length 0"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_arguments_are_refused(arguments, text):
    with pytest.raises(ConfigError, match=text):
        SyntheticScenes(**arguments)
