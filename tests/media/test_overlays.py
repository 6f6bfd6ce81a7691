"""Label maps as pictures: exact colours, and a legend with every class."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from dfn_fast.media import overlays
from dfn_fast.media.overlays import colorize, legend, overlay

PALETTE = np.array([[10, 20, 30], [200, 0, 0], [0, 100, 0]], np.uint8)
CLASSES = ("_background_", "car", "$tree$")


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    drawn: list[Figure] = []
    draw = overlays.pixels
    monkeypatch.setattr(overlays, "pixels", lambda figure: drawn.append(figure) or draw(figure))
    return drawn


def has_colour(picture, colour):
    return bool((picture == colour).all(axis=2).any())


def test_colorize_takes_the_palette_white_for_255_and_black_beyond():
    label = np.array([[0, 1, 2], [255, 3, 254]], np.uint8)
    expected = [[[10, 20, 30], [200, 0, 0], [0, 100, 0]], [[255] * 3, [0] * 3, [0] * 3]]
    np.testing.assert_array_equal(colorize(label, PALETTE), expected)


def test_overlay_mixes_by_alpha_and_leaves_ignored_pixels():
    image = np.full((1, 3, 3), 101, np.uint8)
    label = np.array([[0, 1, 255]], np.uint8)
    mixed = overlay(image, label, PALETTE, alpha=0.25)
    assert mixed.dtype == np.uint8
    np.testing.assert_array_equal(mixed[0, 0], [78, 81, 83])  # 0.75 * 101 + 0.25 * (10, 20, 30), rounded
    np.testing.assert_array_equal(mixed[0, 2], image[0, 2])
    np.testing.assert_array_equal(overlay(image, label, PALETTE, alpha=0), image)
    np.testing.assert_array_equal(overlay(image, label, PALETTE, alpha=1)[0, :2], PALETTE[:2])
    with pytest.raises(ValueError, match="alpha"):
        overlay(image, label, PALETTE, alpha=1.5)


def test_legend_shows_every_class_name_and_colour(figures):
    picture = legend(CLASSES, PALETTE)
    assert picture.dtype == np.uint8
    assert all(has_colour(picture, colour) for colour in PALETTE)
    (drawn,) = figures[0].legends
    assert [text.get_text() for text in drawn.get_texts()] == list(CLASSES)
    assert (picture[0] == 255).all()  # nothing is cut off
    assert (picture[:, -1] == 255).all()


def test_legend_of_many_classes_has_columns():
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 250, (60, 3)).astype(np.uint8)
    picture = legend([f"class {i}" for i in range(60)], palette)
    assert all(has_colour(picture, colour) for colour in palette)
    assert picture.shape[1] > picture.shape[0]


@pytest.mark.parametrize("module", ["dfn_fast.media.overlays", "dfn_fast.train.pictures"])
def test_importing_does_not_import_matplotlib(module):
    code = f"import sys, {module}; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
