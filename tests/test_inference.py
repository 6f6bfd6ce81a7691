"""The predictor against the same meaning written as plain loops, in float64."""

import math

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from dfn_fast.errors import ConfigError, UserError
from dfn_fast.fused import FusedDFN
from dfn_fast.inference import Predictor
from dfn_fast.reference import ReferenceDFN

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
K = 3


def random_model():
    """A small network with random batch norm statistics, whose scores differ from pixel to pixel by about one."""
    torch.manual_seed(0)
    model = ReferenceDFN(K, backbone="resnet18", stem="conv7", channels=8, border_channels=4)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.normal_(layer.running_mean, std=0.2)
            nn.init.normal_(layer.bias, std=0.2)
    model.eval()
    with torch.no_grad():
        for score, head in zip(
            model.scores(torch.randn(1, 3, 64, 64)), (model.smooth_heads, model.border_heads), strict=True
        ):
            head[3].conv.weight /= score[-1].std()
    return model


@pytest.fixture(scope="module")
def model():
    return random_model().double()


@pytest.fixture(scope="module")
def picture():
    """``picture(height, width)`` is an image of blocks and noise."""

    def make(height, width):
        rng = np.random.default_rng(height * width)
        coarse = rng.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), np.uint8)
        image = np.kron(coarse, np.ones((9, 9, 1), np.uint8))[:height, :width].astype(int)
        return np.clip(image + rng.integers(-20, 20, image.shape), 0, 255).astype(np.uint8)

    return make


def resized(maps, size):
    """``[..., h, w]`` -> ``[..., *size]``, bilinear between corners, from the definition."""
    for axis, length in ((-2, size[0]), (-1, size[1])):
        have = maps.shape[axis]
        matrix = np.zeros((length, have))
        for j in range(length):
            place = j * (have - 1) / (length - 1)
            i = min(int(place), max(have - 2, 0))
            matrix[j, i] += 1 - (place - i)
            if have > 1:
                matrix[j, i + 1] += place - i
        maps = np.moveaxis(np.moveaxis(maps, axis, -1) @ matrix.T, -1, axis)
    return maps


def normalised(image):
    return (image / 255 - MEAN) / STD


def small_scores(model, x, heads="smooth_heads"):
    """The stride-4 scores ``[K, h, w]`` of normalised ``[H, W, 3]``, read off the last head's convolution."""
    kept = []
    hook = getattr(model, heads)[3].conv.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        model.scores(torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1)))[None])
    hook.remove()
    return kept[0][0].numpy()


def softmax(scores):
    powers = np.exp(scores - scores.max(0))
    return powers / powers.sum(0)


def scaled(image, scale):
    height, width = image.shape[:2]
    size = (round(width * scale), round(height * scale))
    return cv2.resize(image.astype(np.float64), size, interpolation=cv2.INTER_LINEAR)


def starts(length, window, stride):
    """First positions such that each is one stride on, until the end is covered by one flush with it."""
    places = [0]
    while places[-1] + window < length:
        places.append(min(places[-1] + stride, length - window))
    return places


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
    assert np.ptp(np.stack(expected), axis=0).max() > 0.01  # the scales do not agree by chance


@pytest.mark.parametrize("flip", [False, True])
def test_windows_are_averaged_by_count(model, picture, flip):
    image = picture(60, 81)  # at scale 1.5: 90 x 122 (121.5 rounded to even), neither a multiple of the stride
    window, stride, scale = (48, 64), (32, 43), 1.5  # a third of overlap
    x = normalised(scaled(image, scale))
    H, W = x.shape[:2]
    assert (H, W) == (90, 122)
    expected = []
    for mirrored in (False, True) if flip else (False,):
        total, count = np.zeros((K, H, W)), np.zeros((H, W))
        for top in starts(H, window[0], stride[0]):
            for left in starts(W, window[1], stride[1]):
                tile = x[top : top + window[0], left : left + window[1]]
                if mirrored:
                    scores = resized(small_scores(model, tile[:, ::-1])[..., ::-1], window)
                else:
                    scores = resized(small_scores(model, tile), window)
                total[:, top : top + window[0], left : left + window[1]] += scores
                count[top : top + window[0], left : left + window[1]] += 1
        assert count.min() == 1
        assert count.max() >= 4
        expected.append(softmax(resized(total / count, (60, 81))))
    probabilities = Predictor(model, scales=(scale,), flip=flip, window=window).probabilities(image)
    np.testing.assert_allclose(probabilities, np.mean(expected, axis=0), rtol=0, atol=1e-6)


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
    """On one side or on both: each side of the window is cut to that of the image."""
    image = picture(40, 45)
    whole = Predictor(model, scales=(1, 0.8), flip=True).probabilities(image)
    windowed = Predictor(model, scales=(1, 0.8), flip=True, window=window).probabilities(image)
    torch.testing.assert_close(windowed, whole, rtol=0, atol=1e-6)


def test_image_smaller_than_32_is_padded(model, picture):
    image = picture(20, 40)
    padded = np.zeros((32, 40, 3))
    padded[6 : 6 + 20] = normalised(image)
    scores = resized(small_scores(model, padded), (32, 40))[:, 6 : 6 + 20]
    np.testing.assert_allclose(Predictor(model).probabilities(image), softmax(scores), rtol=0, atol=1e-6)
    assert Predictor(model, scales=(0.5, 1.0), flip=True)(picture(1, 1)).shape == (1, 1)
    assert Predictor(model, scales=(0.4,), window=32, preset="torchseg")(picture(1, 1)).shape == (1, 1)


def test_a_scale_does_not_make_a_side_smaller_than_32(model, picture):
    image = picture(40, 100)
    x = normalised(cv2.resize(image.astype(np.float64), (50, 32), interpolation=cv2.INTER_LINEAR))
    expected = softmax(resized(small_scores(model, x), (40, 100)))
    np.testing.assert_allclose(Predictor(model, scales=(0.5,)).probabilities(image), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("flip", [False, True])
def test_torchseg_preset(model, picture, flip):
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
    predictor = Predictor(model, scales=(0.5, 1, 1.5), flip=flip, window=window, preset="torchseg")
    expected = total / total.sum(2, keepdims=True)
    np.testing.assert_allclose(predictor.probabilities(image), expected.transpose(2, 0, 1), rtol=0, atol=2e-6)


def test_torchseg_windows_are_of_512_unless_told(model):
    assert Predictor(model, preset="torchseg").window == (512, 512)


def test_border_is_the_last_border_score(model, picture):
    image = picture(45, 70)
    x = torch.from_numpy(normalised(image).transpose(2, 0, 1).copy())[None]
    with torch.no_grad():
        expected = torch.sigmoid(model.scores(x).border[-1][0, 0])
    border = Predictor(model, scales=(0.5, 2), flip=True).border(image)  # scale 1 whatever the scales
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
    model.backbone.bn1.eval()  # as a user does who freezes it
    before = [module.training for module in model.modules()]
    probabilities = Predictor(model).probabilities(image)
    after = [module.training for module in model.modules()]
    model.eval()
    assert torch.equal(probabilities, expected)
    assert after == before


def test_bf16_runs_the_network_in_bfloat16_and_the_rest_in_float32(picture):
    model = random_model()
    dtypes = []
    predictor = Predictor(model, amp="bf16")
    predictor.network.smooth_head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    probabilities = predictor.probabilities(picture(40, 48))
    assert dtypes == [torch.bfloat16]
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(0), torch.ones(40, 48), rtol=0, atol=1e-6)
    exact = Predictor(model, amp="off").probabilities(picture(40, 48))
    assert 0 < (probabilities - exact).abs().max() < 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": ()}, "scales"),
        ({"scales": (1, 0)}, "scales"),
        ({"scales": (math.nan,)}, "scales"),
        ({"window": 31}, "window 31"),
        ({"window": (64, 16)}, "window"),
        ({"overlap": 1.0}, "overlap"),
        ({"preset": "median"}, "mean, torchseg"),
        ({"amp": "int8"}, "amp"),
    ],
)
def test_settings_that_make_no_sense_are_errors(model, settings, message):
    with pytest.raises(ConfigError, match=message):
        Predictor(model, **settings)


def test_an_array_that_is_no_rgb_image_is_an_error(model):
    with pytest.raises(ValueError, match="uint8"):
        Predictor(model)(np.zeros((40, 40), np.uint8))


def test_scores_that_are_not_finite_are_an_error(picture):
    model = ReferenceDFN(K, backbone="resnet18", channels=8, border=False)
    nn.init.constant_(model.smooth_heads[3].conv.bias, math.nan)
    with pytest.raises(UserError, match="not finite"):
        Predictor(model)(picture(32, 32))


def test_too_little_memory_says_what_to_do(model, picture, monkeypatch):
    def full(self, data):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FusedDFN, "stages", full)
    with pytest.raises(UserError, match=r"40x32 does not fit .* --window"):
        Predictor(model)(picture(32, 40))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "scale 1, no flip, whole image"),
        ({"scales": (0.5, 1), "flip": True}, "scales 0.5 1, flip, whole image"),
        ({"window": 512}, "scale 1, no flip, window 512x512 overlap 0.33"),
        ({"preset": "torchseg"}, "scale 1, no flip, window 512x512 overlap 0.33, torchseg preset"),
        ({"amp": "bf16"}, "scale 1, no flip, whole image, bf16"),
    ],
)
def test_description_names_scales_flip_and_window(model, settings, text):
    assert Predictor(model, **settings).describe() == text
