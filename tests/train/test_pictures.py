"""The pictures of a run: their panels, and what is omitted."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from dfn_fast.media.images import read_image
from dfn_fast.train import pictures
from dfn_fast.train.pictures import plot_curves, prediction_sheet, running_mean, series

PALETTE = np.array([[10, 20, 30], [200, 0, 0], [0, 100, 0]], np.uint8)
CLASSES = ("_background_", "car", "$tree$")


@pytest.fixture
def figures(monkeypatch):
    """A list of the figures that are drawn."""
    drawn: list[Figure] = []
    draw = pictures.pixels
    monkeypatch.setattr(pictures, "pixels", lambda figure: drawn.append(figure) or draw(figure))
    return drawn


def has_colour(picture, colour):
    return bool((picture == colour).all(axis=2).any())


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
