"""Pictures: exact where pixels are defined, else size, contents and that a file is whole."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from dfn_fast.media.images import read_image
from dfn_fast.media.overlays import colorize, legend, overlay
from dfn_fast.train import pictures
from dfn_fast.train.pictures import plot_curves, prediction_sheet, running_mean, series

PALETTE = np.array([[10, 20, 30], [200, 0, 0], [0, 100, 0]], np.uint8)
CLASSES = ("_background_", "car", "$tree$")


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    drawn: list[Figure] = []
    draw = pictures.pixels
    monkeypatch.setattr(pictures, "pixels", lambda figure: drawn.append(figure) or draw(figure))
    return drawn


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


def has_colour(picture, colour):
    return bool((picture == colour).all(axis=2).any())


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


def make_row(height, width, border=True):
    truth = np.zeros((height, width), np.uint8)
    truth[: height // 2] = 255
    prediction = np.ones((height, width), np.uint8)
    return np.full((height, width, 3), 77, np.uint8), truth, prediction, np.zeros((height, width)) if border else None


def test_prediction_sheet_has_titled_columns_and_a_legend_of_what_is_seen(tmp_path, figures):
    path = tmp_path / "predictions.png"
    prediction_sheet([make_row(40, 60), make_row(60, 40)], CLASSES, PALETTE, path)
    picture = read_image(path)
    assert [has_colour(picture, colour) for colour in (*PALETTE, (77, 77, 77))] == [True, True, False, True]
    assert [axes.get_title() for axes in figures[0].axes] == ["image", "truth", "prediction", "border"] + [""] * 4
    (drawn,) = figures[0].legends
    assert [text.get_text() for text in drawn.get_texts()] == ["_background_", "car", "ignored"]
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.png"]


def test_prediction_sheet_leaves_out_a_column_without_values(tmp_path, figures):
    rows = [make_row(40, 60, border=False), make_row(40, 60, border=False)]
    prediction_sheet(rows, CLASSES, PALETTE, tmp_path / "a.png")
    assert [axes.get_title() for axes in figures[0].axes[:3]] == ["image", "truth", "prediction"]
    assert len(figures[0].axes) == 6


def test_curves_draw_loss_rate_and_iou(tmp_path, figures):
    metrics = [{"kind": "train", "epoch": 1, "iteration": i, "loss": 1 / i, "lr": 0.1 / i} for i in range(1, 101)]
    metrics += [{"kind": "val", "epoch": e, "iteration": 50 * e, "mean_iou": iou} for e, iou in ((1, 0.3), (2, 0.25))]
    plot_curves(metrics, tmp_path / "curves.png")
    loss, rate, iou = figures[0].axes
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [1 / i for i in range(1, 101)])
    np.testing.assert_allclose(rate.lines[0].get_xdata(), range(1, 101))
    np.testing.assert_allclose(iou.lines[0].get_ydata(), [0.3, 0.25])
    assert "best 0.3000, epoch 1" in iou.get_title()
    assert read_image(tmp_path / "curves.png").shape[1] > 1000


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"iteration": 1, "loss": float("nan"), "lr": 0.0, "epoch": 1, "mean_iou": None}],
        [{"epoch": 1, "mean_iou": 0.0}],
    ],
)
def test_curves_of_a_run_that_has_hardly_begun(tmp_path, metrics):
    plot_curves(metrics, tmp_path / "curves.png")
    assert read_image(tmp_path / "curves.png").std() > 0


def test_series_leaves_out_what_is_missing():
    records = [{"x": 1, "y": 2.0}, {"x": 2}, {"x": 3, "y": None}, {"x": 4, "y": float("inf")}, {"x": 5, "y": 1.0}]
    xs, ys = series(records, "x", "y")
    assert (xs.tolist(), ys.tolist()) == ([1, 5], [2, 1])


def test_running_mean_is_cut_at_the_ends():
    np.testing.assert_allclose(running_mean(np.array([0.0, 3.0, 6.0, 0.0])), [1.5, 3, 3, 3])
    np.testing.assert_allclose(running_mean(np.arange(200.0))[100], 100)


def test_importing_does_not_import_matplotlib():
    code = "import sys, dfn_fast.media.overlays; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
