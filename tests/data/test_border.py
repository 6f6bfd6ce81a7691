"""Border targets against their definition: where borders are, where none are, and which changes move none."""

import math

import cv2
import numpy as np
import pytest

from dfn_fast.data.border import border_targets, fill_with_nearest
from dfn_fast.errors import ConfigError, DataError

NEIGHBOURS = np.ones((3, 3), np.uint8)


def blocks(rng, size, block, classes):
    """A random map of square blocks, cut to ``size``."""
    coarse = rng.integers(0, classes, (size[0] // block + 1, size[1] // block + 1), dtype=np.uint8)
    return np.ascontiguousarray(coarse.repeat(block, 0).repeat(block, 1)[: size[0], : size[1]])


def pairs_that_differ(label):
    """Pixels with a neighbour (above, below, left or right) of another class, found one by one."""
    found = np.zeros(label.shape, bool)
    height, width = label.shape
    for y in range(height):
        for x in range(width):
            for v, u in ((y + 1, x), (y, x + 1)):
                if v < height and u < width and label[y, x] != label[v, u]:
                    found[y, x] = found[v, u] = True
    return found


@pytest.mark.parametrize("block", [1, 2, 3, 5, 8])  # 1 and 2: Canny alone misses some
def test_every_boundary_has_an_edge_and_every_edge_a_boundary(block):
    rng = np.random.default_rng(block)
    for size in ((23, 31), (48, 40)):
        label = blocks(rng, size, block, 5)
        edges = border_targets(label, width=1)
        boundary = pairs_that_differ(label)
        assert boundary.any()
        assert not (boundary & (cv2.dilate(edges, NEIGHBOURS) == 0)).any()
        assert not ((edges == 1) & (cv2.dilate(boundary.astype(np.uint8), NEIGHBOURS) == 0)).any()


@pytest.mark.parametrize("at", [1, 2, 17, 38, 39])  # beside the image's border too
def test_straight_boundary_is_one_pixel_wide_without_a_gap(at):
    label = np.zeros((40, 40), np.uint8)
    label[:, at:] = 1
    edges = border_targets(label, width=1)
    assert (edges[:, at - 1 : at + 1].sum(axis=1) == 1).all()
    assert (edges.sum(axis=1) == 1).all()
    np.testing.assert_array_equal(border_targets(np.ascontiguousarray(label.T), width=1), edges.T)


def test_t_junction_has_no_gap():
    label = np.zeros((30, 30), np.uint8)
    label[15:, :15], label[15:, 15:] = 1, 2
    edges = border_targets(label, width=1)
    assert edges[14:16].any(axis=0).all()
    assert edges[15:, 14:16].any(axis=1).all()


def test_thin_structures_are_borders():
    line = np.zeros((20, 20), np.uint8)
    line[:, 10] = 3
    assert cv2.dilate(border_targets(line, width=1), NEIGHBOURS)[:, 10].all()
    dot = np.zeros((9, 9), np.uint8)
    dot[4, 4] = 1
    assert border_targets(dot, width=1)[3:6, 3:6].any()
    checkerboard = (np.indices((16, 16)).sum(axis=0) % 2).astype(np.uint8)
    assert cv2.dilate(border_targets(checkerboard, width=1), NEIGHBOURS).all()


def test_class_numbers_do_not_matter():
    rng = np.random.default_rng(0)
    label = blocks(rng, (64, 80), 7, 6)
    label[rng.random(label.shape) < 0.05] = 255
    expected = border_targets(label)
    for ids in ([3, 5, 0, 1, 2, 4], [0, 1, 2, 3, 4, 5][::-1], [0, 254, 100, 101, 7, 200]):
        renamed = np.full(256, 255, np.uint8)
        renamed[:6] = ids
        np.testing.assert_array_equal(border_targets(renamed[label]), expected)


def test_void_region_has_no_false_border():
    label = np.full((40, 40), 4, np.uint8)
    label[10:25, 12:30] = 255
    expected = np.where(label == 255, 255, 0)
    np.testing.assert_array_equal(border_targets(label), expected)


def test_void_ring_has_its_border_in_its_middle():
    distance = np.hypot(*(np.indices((81, 81)) - 40))
    label = (distance < 20).astype(np.uint8)
    label[abs(distance - 20) <= 3] = 255
    target = border_targets(label, width=9)
    assert (target[label == 255] == 255).all()
    on_border = target == 1
    # The middle lies at 20 and the border reaches 4.5 pixels from it: a little over one on each side of the ring.
    assert on_border[abs(distance - 16.5) < 0.3].all()
    assert on_border[abs(distance - 23.5) < 0.3].all()
    assert not on_border[(distance < 14.5) | (distance > 25.5)].any()


@pytest.mark.parametrize(("near", "far"), [((6, 3), (7, 0)), ((5, 5), (8, 0)), ((3, 6), (0, 7)), ((6, -3), (7, 0))])
def test_a_void_pixel_takes_the_class_that_is_nearest_at_any_angle(near, far):
    label = np.full((31, 31), 255, np.uint8)
    label[15 + near[0], 15 + near[1]], label[15 - far[0], 15 - far[1]] = 1, 2
    assert math.hypot(*near) < math.hypot(*far) < sum(map(abs, near))
    assert fill_with_nearest(label, label == 255)[15, 15] == 1


def test_width_is_the_dilation():
    label = np.zeros((41, 41), np.uint8)
    label[:, 20:] = 1
    line = border_targets(label, width=1).sum(axis=1)
    for width in (3, 5, 7, 11):
        np.testing.assert_array_equal(border_targets(label, width).sum(axis=1), line + width - 1)


def test_other_ignore_index():
    label = np.zeros((20, 20), np.uint8)
    label[:, 10:] = 1
    label[5:8] = 7
    target = border_targets(label, ignore_index=7)
    assert (target[5:8] == 255).all()
    assert (target[np.r_[0:5, 8:20]] < 2).all()
    assert target[0, 10] == 1


def test_all_void_and_one_class():
    assert (border_targets(np.full((5, 7), 255, np.uint8)) == 255).all()
    assert not border_targets(np.full((5, 7), 9, np.uint8)).any()


def test_small_sizes():
    rng = np.random.default_rng(1)
    sizes = [(h, w) for h in (1, 2, 3, 4, 5, 32) for w in (1, 2, 3, 4, 7, 31)]
    for size in sizes:
        label = rng.choice(np.array([0, 1, 2, 255], np.uint8), size)
        target = border_targets(label)
        assert target.shape == size
        assert target.dtype == np.uint8
        np.testing.assert_array_equal(target == 255, label == 255)
        assert set(np.unique(target)) <= {0, 1, 255}


def test_input_is_not_written_to_and_may_be_a_view():
    label = blocks(np.random.default_rng(2), (40, 60), 6, 4)
    label[3:9, 3:9] = 255
    before = label.copy()
    view = label[5:35, 10:50][:, ::-1]
    np.testing.assert_array_equal(border_targets(view), border_targets(view.copy()))
    np.testing.assert_array_equal(label, before)


@pytest.mark.parametrize(
    "label",
    [np.zeros((4, 4), np.int64), np.zeros((1, 4, 4), np.uint8), np.zeros((0, 4), np.uint8), [[0, 1]]],
    ids=["int64", "three dimensions", "empty", "list"],
)
def test_wrong_label_is_refused(label):
    with pytest.raises(DataError, match="uint8 and shape"):
        border_targets(label)


@pytest.mark.parametrize("width", [0, -1, 2, 8, 257, 10**9 + 1])
def test_wrong_width_is_refused(width):
    with pytest.raises(ConfigError, match=f"odd number of pixels .* got {width}"):
        border_targets(np.zeros((4, 4), np.uint8), width)
