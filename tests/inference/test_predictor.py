"""The predictor against the same computation in plain float64 loops."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dfn_fast.errors import ConfigError, UserError
from dfn_fast.inference.predictor import Predictor
from dfn_fast.network.reference import ReferenceDFN
from support.plain_predictions import K, normalised, random_model, resized, scaled, small_scores, softmax


def test_one_scale_is_the_networks_own_answer(model, picture):
    image = picture(45, 70)
    x = torch.from_numpy(normalised(image).transpose(2, 0, 1).copy())[None]
    with torch.no_grad():
        expected = model(x)[0].exp()
    predictor = Predictor(model)
    probabilities = predictor.probabilities(image)
    torch.testing.assert_close(probabilities, expected.float(), rtol=0, atol=1e-6)
    labels = predictor(image)
    assert labels.dtype == np.uint8
    assert labels.shape == (45, 70)
    np.testing.assert_array_equal(labels, expected.argmax(0))
    assert len(np.unique(labels)) > 1


@pytest.mark.parametrize("flip", [False, True])
def test_scales_and_mirror_images_are_averaged_as_probabilities(model, picture, flip):
    image = picture(50, 66)
    expected = []
    for scale in (0.75, 1.0, 1.5):
        x = normalised(scaled(image, scale))
        expected.append(softmax(resized(small_scores(model, x), (50, 66))))
        if flip:
            mirrored = small_scores(model, x[:, ::-1])
            expected.append(softmax(resized(mirrored[..., ::-1], (50, 66))))
    probabilities = Predictor(model, scales=(0.75, 1, 1.5), flip=flip).probabilities(image)
    assert probabilities.dtype == torch.float32
    np.testing.assert_allclose(probabilities, np.mean(expected, axis=0), rtol=0, atol=1e-6)
    assert np.ptp(np.stack(expected), axis=0).max() > 0.01  # the scales really differ


def test_many_images_of_any_size(model, picture):
    """A list keeps its order, equal sizes run as one batch, and an empty list gives an empty list."""
    images = [picture(40, 50), picture(33, 64), picture(40, 50)[::-1], picture(40, 50)]
    for batch, runs in ((2, [2, 1, 1]), (None, [1, 1, 1, 1])):
        predictor = Predictor(model, scales=(1, 1.3), batch=batch)
        expected, sizes = [predictor(image) for image in images], []
        predictor.network.backbone.stem.register_forward_hook(
            lambda module, args, out, sizes=sizes: sizes.append(len(out))
        )
        labels = predictor(images)
        assert sizes == [n for n in runs for _ in predictor.settings()["scales"]]
        assert len(labels) == 4
        for ours, alone in zip(labels, expected, strict=True):
            np.testing.assert_array_equal(ours, alone)
    assert predictor([]) == []


def test_tensors_stay_tensors(model, picture):
    predictor, image = Predictor(model), picture(40, 50)
    expected = predictor(image)
    labels = predictor(torch.from_numpy(image))
    assert labels.dtype == torch.uint8
    np.testing.assert_array_equal(labels, expected)
    both = predictor(torch.from_numpy(np.stack([image, image[:, ::-1]])))
    np.testing.assert_array_equal(both[0], expected)
    assert both.shape == (2, 40, 50)


def test_views_of_an_image_are_read_as_they_are(model, picture):
    image = picture(50, 64)
    for view in (image[::-1], image[:, ::-1], image[3:45:1, 2:60], image[..., ::-1]):
        np.testing.assert_array_equal(Predictor(model)(view), Predictor(model)(view.copy()))


def test_image_smaller_than_32_is_padded(model, picture):
    image = picture(20, 40)
    padded = np.zeros((32, 40, 3))
    padded[6 : 6 + 20] = normalised(image)
    scores = resized(small_scores(model, padded), (32, 40))[:, 6 : 6 + 20]
    np.testing.assert_allclose(Predictor(model).probabilities(image), softmax(scores), rtol=0, atol=1e-6)
    assert Predictor(model, scales=(0.5, 1.0), flip=True)(picture(1, 1)).shape == (1, 1)
    assert Predictor(model, scales=(0.4,), window=32, rule="torchseg")(picture(1, 1)).shape == (1, 1)


def test_a_scale_does_not_make_a_side_smaller_than_32(model, picture):
    image = picture(40, 100)
    x = normalised(cv2.resize(image.astype(np.float64), (50, 32), interpolation=cv2.INTER_LINEAR))
    expected = softmax(resized(small_scores(model, x), (40, 100)))
    np.testing.assert_allclose(Predictor(model, scales=(0.5,)).probabilities(image), expected, rtol=0, atol=1e-6)


def test_border_is_the_last_border_score(model, picture):
    image = picture(45, 70)
    x = torch.from_numpy(normalised(image).transpose(2, 0, 1).copy())[None]
    with torch.no_grad():
        expected = torch.sigmoid(model.scores(x).border[-1][0, 0])
    border = Predictor(model, scales=(0.5, 2), flip=True).border(image)  # borders use scale 1, whatever the scales
    assert border.dtype == np.float32
    np.testing.assert_allclose(border, expected, rtol=0, atol=1e-6)
    assert np.ptp(border) > 0.01


def test_border_without_a_border_network_is_an_error(picture):
    model = ReferenceDFN(K, backbone="resnet18", channels=8, border=False)
    with pytest.raises(ConfigError, match="Border Network"):
        Predictor(model).border(picture(32, 32))


def test_modes_of_the_modules_are_left_as_they_were(model, picture):
    image = picture(32, 40)
    expected = Predictor(model).probabilities(image)
    model.train()
    model.backbone.bn1.eval()  # as a user who freezes it does
    before = [module.training for module in model.modules()]
    probabilities = Predictor(model).probabilities(image)
    after = [module.training for module in model.modules()]
    model.eval()
    assert torch.equal(probabilities, expected)
    assert after == before


@pytest.mark.parametrize("window", [None, 48])
def test_nothing_that_is_not_finite_becomes_a_label(picture, window):
    model = random_model()
    nn.init.constant_(model.smooth_heads[3].conv.bias, math.inf)
    with pytest.raises(UserError, match="not finite"):
        Predictor(model, amp="off", window=window)(picture(60, 60))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "batch 0"),
        ({"bucket": 0}, "bucket 0"),
        ({"graph_cache_bytes": 0}, "graph_cache_bytes 0"),
        ({"window_weight": "cosine"}, "count, gaussian"),
        ({"scales": ()}, "scales"),
        ({"scales": (1, 0)}, "scales"),
        ({"scales": (math.nan,)}, "scales"),
        ({"window": 31}, "window 31"),
        ({"window": (64, 16)}, "window 64x16"),
        ({"window": (64, 10**30)}, "window 64x10*: .* at most 65536"),
        ({"overlap": 0.96}, "overlap"),
        ({"scales": (1e300,)}, "scales 1e[+]300: .* up to 16"),
        ({"scales": (1,) * 33}, "1 to 32 numbers"),
        ({"bucket": 4097}, "bucket 4097: .* at most 4096"),
        ({"batch": 1 << 40}, "batch"),
        ({"graph_cache_bytes": 1 << 60}, "graph_cache_bytes"),
        ({"rule": "median"}, "mean, torchseg"),
        ({"amp": "int8"}, "amp"),
    ],
)
def test_settings_that_make_no_sense_are_errors(model, settings, message):
    with pytest.raises(ConfigError, match=message):
        Predictor(model, **settings)


def test_scores_that_are_not_finite_are_an_error(picture):
    model = ReferenceDFN(K, backbone="resnet18", channels=8, border=False)
    nn.init.constant_(model.smooth_heads[3].conv.bias, math.nan)
    with pytest.raises(UserError, match="not finite"):
        Predictor(model)(picture(32, 32))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "scale 1, no flip, whole image"),
        ({"scales": (0.5, 1), "flip": True}, "scales 0.5 1, flip, whole image"),
        ({"window": 512}, "scale 1, no flip, window 512x512 overlap 0.33"),
        ({"rule": "torchseg"}, "scale 1, no flip, window 512x512 overlap 0.33, torchseg rule"),
        ({"amp": "bf16"}, "scale 1, no flip, whole image, bf16"),
    ],
)
def test_description_names_scales_flip_and_window(model, settings, text):
    assert Predictor(model, **settings).describe() == text


def test_a_batch_of_no_images_is_an_error(model):
    """It has no image to choose the precision with. An empty list has an empty result."""
    predictor = Predictor(model)
    with pytest.raises(ValueError, match=r"expected an RGB image \[H, W, 3\] of uint8, got .*\[0, 40, 40, 3\]"):
        predictor(torch.zeros(0, 40, 40, 3, dtype=torch.uint8))
    assert predictor([]) == []


def test_a_pil_image_is_its_array(model, picture):
    image = picture(40, 50)
    opened, predictor = Image.fromarray(image), Predictor(model, amp="off")
    rotated = Image.fromarray(image)
    rotated.getexif()[0x0112] = 6  # a quarter turn, which says how to show the pixels, not what they are
    expected = predictor(image)
    np.testing.assert_array_equal(predictor(opened), expected)
    np.testing.assert_array_equal(predictor([image, opened, rotated]), [expected] * 3)
    assert torch.equal(predictor.probabilities(opened), predictor.probabilities(image))
    np.testing.assert_array_equal(predictor.border(opened), predictor.border(image))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "NoneType; cv2.imread returns None"),
        ("photo.jpg", r"str 'photo\.jpg'; read the file first"),
        (Path("photo.jpg"), "Path.*read the file first"),
        ((np.zeros((40, 40, 3), np.uint8),), "tuple; .*as a list"),
        (b"\x89PNG", "bytes"),
        (Image.new("L", (40, 40)), r"mode RGB, got L; convert it: image\.convert\('RGB'\)"),
        (Image.new("RGBA", (40, 40)), "got RGBA"),
        (np.zeros((40, 40, 4), np.uint8), r"uint8 \[40, 40, 4\]"),
        (np.zeros((40, 40, 3), np.float32), "float32"),
    ],
)
def test_what_is_no_image_is_a_value_error_that_says_what_came(model, image, message):
    predictor = Predictor(model, amp="off")
    for call in (predictor, predictor.probabilities, predictor.border, lambda image: predictor([image])):
        with pytest.raises(ValueError, match=message):
            call(image)
