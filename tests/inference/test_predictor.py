"""The predictor against the same meaning written as plain loops, in float64."""

import math
import os
import threading

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from dfn_fast.errors import ConfigError, UserError
from dfn_fast.inference import combine
from dfn_fast.inference import predictor as inference
from dfn_fast.inference.predictor import Predictor
from dfn_fast.network.fused import FusedDFN
from dfn_fast.network.reference import ReferenceDFN

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


def gaussian(length):
    """A Gaussian around the middle of a side, an eighth of it wide."""
    return np.exp(-0.5 * ((np.arange(length) - (length - 1) / 2) / (length / 8)) ** 2)


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("weight", ["count", "gaussian"])
@pytest.mark.parametrize("flip", [False, True])
def test_windows_are_averaged(model, picture, flip, weight, batch):
    image = picture(60, 81)  # at scale 1.5: 90 x 122 (121.5 rounded to even), neither a multiple of the stride
    window, stride, scale = (48, 64), (32, 43), 1.5  # a third of overlap
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


@pytest.mark.parametrize("settings", [{"window": 48}, {"window": 40, "rule": "torchseg"}], ids=["mean", "torchseg"])
def test_bands_are_the_whole(model, picture, settings, monkeypatch):
    """Put together a few rows at a time, which is how large images are."""
    image, settings = picture(90, 71), {"scales": (0.6, 1, 1.4), "flip": True, **settings}
    whole = Predictor(model, **settings).probabilities(image)
    for rows in (1, 7):
        monkeypatch.setattr(combine, "BAND_BYTES", rows * 4 * K * 71 * 2)
        torch.testing.assert_close(Predictor(model, **settings).probabilities(image), whole, rtol=0, atol=1e-6)


def test_many_images_of_any_size(model, picture):
    """A list, in its order, equal sizes in one run of the network; nothing for nothing."""
    images = [picture(40, 50), picture(33, 64), picture(40, 50)[::-1], picture(40, 50)]
    for batch, runs in ((2, [2, 1, 1]), (None, [1, 1, 1, 1])):
        predictor = Predictor(model, scales=(1, 1.3), batch=batch)
        expected, sizes = [predictor(image) for image in images], []
        predictor.network.stem.register_forward_hook(lambda module, args, out, sizes=sizes: sizes.append(len(out)))
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


def test_too_little_memory_for_a_batch_takes_half(model, picture, monkeypatch):
    """Here more than two images at once do not fit."""
    images = [picture(40, 50 + i % 2) for i in range(8)]
    expected = [Predictor(model)(image) for image in images]
    sizes, stages = [], FusedDFN.stages

    def small(self, data):
        sizes.append(len(data))
        if len(data) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stages(self, data)

    monkeypatch.setattr(FusedDFN, "stages", small)
    for ours, alone in zip(Predictor(model, batch=4)(images), expected, strict=True):
        np.testing.assert_array_equal(ours, alone)
    assert sizes == [4, 2, 2] * 2


def test_refresh_takes_new_weights(picture):
    model, image = random_model(), picture(40, 50)
    predictor = Predictor(model, amp="off")
    before = predictor.probabilities(image)
    with torch.no_grad():
        model.smooth_heads[3].conv.weight.neg_()
    assert torch.equal(predictor.probabilities(image), before)
    predictor.refresh()
    assert torch.equal(predictor.probabilities(image), Predictor(model, amp="off").probabilities(image))
    assert not torch.allclose(predictor.probabilities(image), before, atol=0.1)


def test_a_fused_network_is_taken_as_it_is(model, picture):
    image = picture(40, 50)
    predictor = Predictor(FusedDFN(model, return_border=True), flip=True)
    torch.testing.assert_close(
        predictor.probabilities(image), Predictor(model, flip=True).probabilities(image), rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(predictor.border(image), Predictor(model).border(image), rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="Border Network"):
        Predictor(FusedDFN(model)).border(image)


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("changes", [True, False])
def test_auto_takes_bf16_where_the_processor_has_it_and_labels_keep(picture, monkeypatch, supported, changes):
    model, image = random_model(), picture(64, 64)
    nn.init.constant_(model.smooth_heads[3].conv.weight, 0)
    if changes:  # two classes that differ by what bf16 rounds away
        head = model.smooth_heads[3].conv
        with torch.no_grad():
            head.weight.copy_(torch.randn_like(head.weight[:1]) * (1 + 1e-4 * torch.randn_like(head.weight)))
    else:
        model.smooth_heads[3].conv.bias.data = torch.tensor([0.0, 5.0, 0.0])
    monkeypatch.setattr(inference, "has_bf16_arithmetic", lambda: supported)
    predictor = Predictor(model)
    labels = predictor(image)
    took = supported and not changes
    assert predictor.network.dtype == (torch.bfloat16 if took else torch.float32)
    assert predictor.describe().endswith(", bf16") == took
    np.testing.assert_array_equal(labels, Predictor(model, amp="bf16" if took else "off")(image))


def test_several_threads_share_a_predictor(model, picture):
    """At its first calls too, when the network is made."""
    images = [picture(40 + i, 50) for i in range(8)]
    expected = [Predictor(model, flip=True)(image) for image in images]
    predictor, found = Predictor(model, flip=True), {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: predictor(images[i])})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        np.testing.assert_array_equal(found[i], expected[i])


def test_graphs_bucket_and_warm_up(model, picture, monkeypatch):
    """As on CUDA, with a graph that is none: one for each size, padded sizes cut out again."""
    from support.stand_in_graphs import StandIn

    device = torch.device("cpu")
    monkeypatch.setattr(Predictor, "_wants_graphs", lambda self: True)
    monkeypatch.setattr(inference, "CudaGraphs", lambda device: StandIn())
    predictor = Predictor(model, scales=(1, 1.5), flip=True, bucket=32)
    predictor.warm_up([(40, 50), (64, 64), (30, 60), (90, 100)])
    plain = Predictor(model, scales=(1, 1.5), flip=True)
    for size in ((40, 50), (64, 64), (30, 60), (40, 50)):
        image = picture(*size)
        padded = np.full((64 if size[0] > 32 else 32, 64, 3), (124, 116, 104), np.uint8)
        padded[: size[0], : size[1]] = image
        labels = predictor(image)
        assert labels.shape == size
        np.testing.assert_array_equal(labels, plain(padded)[: size[0], : size[1]])
    statistics = predictor._graphs().statistics()
    assert statistics["captures"] == 3
    assert statistics["hits"] == 4
    assert device == predictor.device


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("window", [None, 48])
def test_on_a_gpu_labels_are_those_of_the_cpu(picture, window):
    model, image = random_model(), picture(90, 71)
    settings = {"scales": (0.5, 1, 1.5), "flip": True, "window": window, "amp": "off"}
    expected = Predictor(model, **settings)(image)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        predictor = Predictor(random_model(), device="cuda", **settings)
        for _ in range(3):  # eager, captured and replayed
            assert (predictor(image) != expected).mean() < 1e-3
    many = predictor([image, image[:, ::-1], picture(64, 64)])
    assert [labels.shape for labels in many] == [(90, 71), (90, 71), (64, 64)]


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_one_upload_and_one_download(picture):
    from torch.profiler import ProfilerActivity, profile

    predictor, image = Predictor(random_model(), device="cuda", scales=(0.5, 1, 1.5), flip=True), picture(128, 96)
    predictor(image)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        predictor(image)
    names = [event.name for event in profiler.events()]
    assert sum("Memcpy HtoD" in name for name in names) == 1
    assert sum("Memcpy DtoH" in name for name in names) == 1


@pytest.mark.slow
def test_compiled_gives_the_same(picture):
    model, image = random_model(), picture(64, 48)
    expected = Predictor(model, amp="off", flip=True).probabilities(image)
    ours = Predictor(model, amp="off", flip=True, compile=True).probabilities(image)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_a_large_image_of_many_classes_takes_bounded_memory():
    """A strip of an image of 4096 x 4096 at 150 classes, whose probabilities alone would be 10 GB: far below 2 GB
    beyond the network's own, which do not grow with the height. The network is a stand-in that costs nothing, as what
    it needs itself does not count."""
    image = np.zeros((900, 4096, 3), np.uint8)
    model = ReferenceDFN(150, backbone="resnet18", channels=8, border=False)
    predictor = Predictor(model, window=512, amp="off", batch=4)
    predictor.engine.scores = lambda x: x[:, :1, ::4, ::4] * torch.arange(150.0).view(1, 150, 1, 1)
    with Peak() as peak:
        labels = predictor(image)
    assert labels.shape == (900, 4096)
    assert peak.bytes < 1.2e9, f"{peak.bytes / 1e9:.2f} GB"


class Peak:
    """The most resident memory that the process had inside, beyond that before."""

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
    assert Predictor(model, scales=(0.4,), window=32, rule="torchseg")(picture(1, 1)).shape == (1, 1)


def test_a_scale_does_not_make_a_side_smaller_than_32(model, picture):
    image = picture(40, 100)
    x = normalised(cv2.resize(image.astype(np.float64), (50, 32), interpolation=cv2.INTER_LINEAR))
    expected = softmax(resized(small_scores(model, x), (40, 100)))
    np.testing.assert_allclose(Predictor(model, scales=(0.5,)).probabilities(image), expected, rtol=0, atol=1e-6)


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
        ({"overlap": 1.0}, "overlap"),
        ({"rule": "median"}, "mean, torchseg"),
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
        ({"rule": "torchseg"}, "scale 1, no flip, window 512x512 overlap 0.33, torchseg rule"),
        ({"amp": "bf16"}, "scale 1, no flip, whole image, bf16"),
    ],
)
def test_description_names_scales_flip_and_window(model, settings, text):
    assert Predictor(model, **settings).describe() == text


def test_a_batch_of_no_images_is_an_error(model):
    """There is nothing to decide a precision on; an empty list has an empty answer."""
    predictor = Predictor(model)
    with pytest.raises(ValueError, match=r"expected an RGB image \[H, W, 3\] of uint8, got .*\[0, 40, 40, 3\]"):
        predictor(torch.zeros(0, 40, 40, 3, dtype=torch.uint8))
    assert predictor([]) == []
