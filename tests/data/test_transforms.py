"""The training transform and normalisation: what may change, what may not, and that the three maps stay aligned."""

import pickle

import numpy as np
import pytest
import torch

from dfn_fast.data.border import border_targets
from dfn_fast.data.normalize import IMAGENET_MEAN, IMAGENET_STD, PAD_COLOUR, normalize
from dfn_fast.data.transforms import TrainTransform, rescale
from dfn_fast.errors import ConfigError


def transform(crop=(64, 96), scales=(1.0,), flip=False, border_width=3):
    return TrainTransform(crop, scales, flip, border_width)


def numbered(height, width):
    """An image that names each pixel's row and column in its colours, and the label that follows from them."""
    rows, columns = np.indices((height, width))
    image = np.stack([rows, columns, np.full_like(rows, 7)], axis=-1).astype(np.uint8)
    return image, ((rows // 8 * 3 + columns // 8) % 5).astype(np.uint8)


def label_of(image):
    return (image[..., 0] // 8 * 3 + image[..., 1] // 8) % 5


@pytest.mark.parametrize("size", [(200, 240), (64, 96), (70, 50), (40, 200), (1, 1)])  # larger, equal, smaller, mixed
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 0.75, 1.0, 1.5, 1.75)])
def test_outputs_have_the_crops_size(size, scales):
    image, label = numbered(*size)
    for seed in range(6):
        for array in transform(scales=scales, flip=True)(image, label, np.random.default_rng(seed)):
            assert array.shape[:2] == (64, 96)
            assert array.dtype == np.uint8
            assert array.flags.c_contiguous


def test_image_and_label_stay_together():
    image, label = numbered(100, 120)
    for seed in range(10):
        new_image, new_label, border = transform(flip=True)(image, label, np.random.default_rng(seed))
        np.testing.assert_array_equal(new_label, label_of(new_image))
        np.testing.assert_array_equal(border, border_targets(new_label, 3))


def test_padding_is_ignored_and_mean_coloured():
    image, label = numbered(40, 50)
    image[..., 2] = 250
    places = set()
    for seed in range(30):
        new_image, new_label, border = transform(flip=True)(image, label, np.random.default_rng(seed))
        inside = new_image[..., 2] == 250
        assert inside.sum() == 40 * 50
        assert (new_image[~inside] == PAD_COLOUR).all()
        assert (new_label[~inside] == 255).all()
        assert (border[~inside] == 255).all()
        np.testing.assert_array_equal(new_label[inside], label_of(new_image)[inside])
        places.add(tuple(np.argwhere(inside)[0]))
    assert len(places) > 20


def test_pad_colour_normalises_to_zero():
    padding = torch.tensor(PAD_COLOUR, dtype=torch.uint8).view(1, 3, 1, 1)
    assert normalize(padding).abs().max() < 0.5 / 255 / min(IMAGENET_STD)


def test_every_position_is_drawn():
    image, label = numbered(66, 99)
    corners = [tuple(transform()(image, label, np.random.default_rng(s))[0][0, 0, :2]) for s in range(300)]
    assert set(corners) == {(y, x) for y in range(3) for x in range(4)}
    assert min(corners.count(corner) for corner in set(corners)) > 8  # 25 expected


def test_flip_mirrors_half_of_the_samples():
    image, label = numbered(64, 96)
    flips = 0
    for seed in range(100):
        new_image, *_ = transform(flip=True)(image, label, np.random.default_rng(seed))
        flipped = new_image[0, 0, 1] == 95
        np.testing.assert_array_equal(new_image, image[:, ::-1] if flipped else image)
        flips += flipped
    assert 30 < flips < 70
    assert not any(transform()(image, label, np.random.default_rng(s))[0][0, 0, 1] for s in range(20))


def test_every_scale_is_drawn():
    image = np.full((64, 64, 3), 200, np.uint8)
    label = np.zeros((64, 64), np.uint8)
    counts = {}
    for seed in range(150):
        rng = np.random.default_rng(seed)
        valid = (transform((128, 128), (0.5, 0.75, 1.0, 1.5, 1.75))(image, label, rng)[1] == 0).sum()
        counts[valid] = counts.get(valid, 0) + 1
    assert set(counts) == {32**2, 48**2, 64**2, 96**2, 112**2}
    assert min(counts.values()) > 12  # 30 expected


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.5, 1.75, 3.0])
def test_labels_are_not_interpolated_and_not_shifted(scale):
    """The label of stripes must match their brightness, to the pixel where the brightness is between two."""
    stripes = np.random.default_rng(0).choice(np.array([10, 255], np.uint8), 30).repeat(5)
    columns = np.broadcast_to(stripes, (120, 150))
    for label in (columns, np.ascontiguousarray(columns.T)):
        image = np.repeat(np.where(label == 10, 0, 200).astype(np.uint8)[..., None], 3, axis=2)
        new_image, new_label = rescale(image, label, scale)
        assert new_label.shape == tuple(round(n * scale) for n in label.shape)
        assert set(np.unique(new_label)) == {10, 255}
        bright, dark = new_image[..., 0] > 104, new_image[..., 0] < 96
        assert (new_label[bright] == 255).all()
        assert (new_label[dark] == 10).all()


def test_same_generator_same_sample_and_inputs_unchanged():
    image, label = numbered(90, 110)
    before = image.copy(), label.copy()
    augment = transform(scales=(0.5, 1.0, 1.5), flip=True)
    first, again, other = (augment(image, label, np.random.default_rng(s)) for s in (5, 5, 6))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(label, before[1])
    same_size = transform()(image[:64, :96], label[:64, :96], np.random.default_rng(0))
    assert not any(np.shares_memory(a, b) for a in same_size[:2] for b in (image, label))


def test_draws_do_not_depend_on_the_sample():
    left = set()
    for size in ((200, 200), (40, 40), (64, 96)):
        rng = np.random.default_rng(3)
        transform(scales=(0.5, 1.0, 2.0), flip=True)(*numbered(*size), rng)
        left.add(rng.random())
    assert len(left) == 1


def test_pickles():
    augment = transform()
    assert pickle.loads(pickle.dumps(augment)) == augment


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"crop": (31, 64)}, "crop 31x64: expected at least 32x32.*larger crop"),
        ({"crop": (64, 0)}, "crop 64x0"),
        ({"scales": ()}, "scales"),
        ({"scales": (1.0, 0.0)}, "scales"),
        ({"scales": (float("nan"),)}, "scales"),
        ({"scales": (1.0, 17.0)}, "scales"),
        ({"border_width": 4}, "border width.*odd.*got 4"),
    ],
)
def test_wrong_fields_are_refused(fields, text):
    with pytest.raises(ConfigError, match=text):
        transform(**fields)


def test_crop_of_32_is_allowed():
    assert transform((32, 32))(*numbered(40, 40), np.random.default_rng(0))[0].shape == (32, 32, 3)


def test_red_is_the_first_channel():
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(normalize(red).flatten(), torch.tensor([2.2489, -2.0357, -1.8044]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)]
)
def test_normalize(dtype, tolerance, channels_last):
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.manual_seed(0))
    given = images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    result = normalize(given, dtype)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    for c in range(3):
        expected = (images[:, c].double().numpy() / 255 - IMAGENET_MEAN[c]) / IMAGENET_STD[c]
        np.testing.assert_allclose(result[:, c].double().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_normalize_takes_any_view():
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    view = images[::2, 1:7, ::2].permute(0, 3, 1, 2)
    torch.testing.assert_close(normalize(view), normalize(view.contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, 3, dtype=torch.uint8)])
def test_normalize_refuses_other_input(images):
    with pytest.raises(ValueError, match="uint8 images"):
        normalize(images)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_normalize_on_the_gpu():
    images = torch.randint(0, 256, (2, 3, 33, 17), dtype=torch.uint8)
    result = normalize(images.cuda())
    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), normalize(images), rtol=1e-6, atol=1e-6)
