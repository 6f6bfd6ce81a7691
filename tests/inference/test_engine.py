"""How the network runs: precision, compilation, graphs, memory, threads, new weights."""

import copy
import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from dfn_fast.errors import ConfigError, UserError
from dfn_fast.inference import predictor as inference
from dfn_fast.inference.engine import Engine
from dfn_fast.inference.predictor import Predictor
from dfn_fast.network.fused import FusedDFN
from dfn_fast.runtime.forks import first_call
from support.plain_predictions import random_model
from support.stand_in_graphs import StandIn

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("changes", [True, False])
def test_auto_takes_bf16_if_the_cpu_has_it_and_labels_stay(picture, monkeypatch, supported, changes):
    model, image = random_model(), picture(64, 64)
    nn.init.constant_(model.smooth_heads[3].conv.weight, 0)
    if changes:  # two classes whose difference is lost in bf16 rounding
        head = model.smooth_heads[3].conv
        with torch.no_grad():
            head.weight.copy_(torch.randn_like(head.weight[:1]) * (1 + 1e-4 * torch.randn_like(head.weight)))
    else:
        model.smooth_heads[3].conv.bias.data = torch.tensor([0.0, 5.0, 0.0])
    monkeypatch.setattr(inference, "has_bf16_arithmetic", lambda: supported)
    predictor, runs = Predictor(model), []
    run = predictor._run
    monkeypatch.setattr(predictor, "_run", lambda images: runs.append(predictor.amp) or run(images))
    labels = predictor(image)
    took = supported and not changes
    assert runs == (["off", "bf16"] if supported else ["off"])  # no precision twice
    assert predictor.network.dtype == (torch.bfloat16 if took else torch.float32)
    assert predictor.describe().endswith(", bf16") == took
    np.testing.assert_array_equal(labels, Predictor(model, amp="bf16" if took else "off")(image))


def test_bf16_is_for_the_network_only(picture):
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


@pytest.mark.slow
def test_compiled_gives_the_same(picture):
    model, image = random_model(), picture(64, 48)
    expected = Predictor(model, amp="off", flip=True).probabilities(image)
    ours = Predictor(model, amp="off", flip=True, compile=True).probabilities(image)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_graphs_bucket_and_warm_up(model, picture, monkeypatch):
    """As on CUDA, but with stand-in graphs: one for each padded size, and outputs are cropped."""
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


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("window", [None, 48])
def test_on_a_gpu_labels_are_those_of_the_cpu(picture, window):
    model, image = random_model(), picture(90, 71)
    settings = {"scales": (0.5, 1, 1.5), "flip": True, "window": window, "amp": "off"}
    expected = Predictor(model, **settings)(image)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        predictor = Predictor(random_model(), device="cuda", **settings)
        for _ in range(4):  # eager twice, capture, replay
            assert (predictor(image) != expected).mean() < 1e-3
    many = predictor([image, image[:, ::-1], picture(64, 64)])
    assert [labels.shape for labels in many] == [(90, 71), (90, 71), (64, 64)]


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_one_upload_and_one_download(picture):
    from torch.profiler import ProfilerActivity, profile

    predictor, image = Predictor(random_model(), device="cuda", scales=(0.5, 1, 1.5), flip=True), picture(128, 96)
    predictor.warm_up([(128, 96)])
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        predictor(image)
    names = [event.name for event in profiler.events()]
    assert sum("Memcpy HtoD" in name for name in names) == 1
    assert sum("Memcpy DtoH" in name for name in names) == 1


def test_too_little_memory_for_a_batch_takes_half(model, picture, monkeypatch):
    """Batches of more than two images run out of memory here."""
    images = [picture(40, 50 + i % 2) for i in range(8)]
    expected = [Predictor(model)(image) for image in images]
    sizes, stages = [], FusedDFN.stages

    def small(self, data):
        sizes.append(len(data))
        if len(data) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stages(self, data)

    predictor = Predictor(model, batch=4)
    assert predictor.network.dtype == torch.float64  # built and compared with the model while memory suffices
    monkeypatch.setattr(FusedDFN, "stages", small)
    for ours, alone in zip(predictor(images), expected, strict=True):
        np.testing.assert_array_equal(ours, alone)
    assert sizes == [4, 2, 2] * 2


def test_too_little_memory_says_what_to_do(model, picture, monkeypatch):
    def full(self, data):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FusedDFN, "stages", full)
    with pytest.raises(UserError, match=r"40x32 does not fit .* --window"):
        Predictor(model)(picture(32, 40))


def test_several_threads_share_a_predictor(model, picture):
    """Also on the first calls, which build the network."""
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


def test_two_first_calls_make_one_network(model, monkeypatch):
    made, both = [], threading.Barrier(2)
    fuse = FusedDFN.__init__

    def slow(self, *arguments, **settings):
        made.append(settings["return_border"])
        time.sleep(0.2)  # so that the second call comes while the first one builds
        fuse(self, *arguments, **settings)

    monkeypatch.setattr(FusedDFN, "__init__", slow)
    engine = Engine(model, "off", compile=False, batch=None)

    def first_calls():
        both.wait()
        found.append((engine.network, engine.border_network))

    found = []
    threads = [threading.Thread(target=first_calls) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [False, True]
    assert found[0] == found[1]


def test_refresh_takes_new_weights(picture):
    model, image = random_model(), picture(40, 50)
    predictor = Predictor(model, amp="off")
    calls = {
        "scores": predictor.probabilities,
        "border": lambda image: torch.from_numpy(predictor.border(image)),
    }
    before = {name: call(image) for name, call in calls.items()}
    with torch.no_grad():
        model.smooth_heads[3].conv.weight.neg_()
        model.border_heads[3].conv.weight.neg_()
    assert all(torch.equal(call(image), before[name]) for name, call in calls.items())
    predictor.refresh()
    fresh = Predictor(model, amp="off")
    assert torch.equal(predictor.probabilities(image), fresh.probabilities(image))
    np.testing.assert_array_equal(predictor.border(image), fresh.border(image))
    assert not any(torch.allclose(call(image), before[name], atol=0.1) for name, call in calls.items())


def test_another_precision_measures_its_tiles_anew(model):
    engine = Engine(model, "off", compile=False, batch=None)
    engine._tile_bytes[32, 32] = 1 << 40
    engine.use("bf16")
    assert not engine._tile_bytes


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_gives_what_the_predictor_gives(picture, duplicate):
    model, image = random_model(), picture(32, 40)
    predictor = Predictor(model, flip=True, amp="bf16")
    predictor(image)
    predictor.border(image)
    with torch.no_grad():
        model.smooth_heads[3].conv.weight.neg_()  # seen after refresh(), by the predictor and its copy
    other = duplicate(predictor)
    assert other.settings() == predictor.settings()
    for _ in range(2):
        assert torch.equal(other.probabilities(image), predictor.probabilities(image))
        np.testing.assert_array_equal(other.border(image), predictor.border(image))
        predictor.refresh()
        other.refresh()


def test_a_fork_of_a_used_predictor_predicts(model, picture, monkeypatch):
    """Even if another thread was building a network, and PyTorch had threads of its own."""
    image = picture(96, 96)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        predictor = Predictor(model, amp="auto")
        expected = predictor(image)
        held, done = threading.Event(), threading.Event()

        def hold():
            with first_call():
                held.set()
                done.wait()

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a child that waits for ever is killed
            signal.alarm(30)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                labels = [predictor(image), Predictor(model, amp="auto")(image)]
            good = all((x == expected).all() for x in labels)
            os._exit(0 if good and ["1 thread" in str(w.message) for w in said] == [True] else 3)
        done.set()
        holder.join()
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_spawned_workers_take_a_predictor(model, picture):
    images = [picture(40, 50), picture(33, 64)]
    predictor = Predictor(model, amp="off")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.map(predictor, images)
    for labels, image in zip(found, images, strict=True):
        np.testing.assert_array_equal(labels, predictor(image))


def test_a_fused_network_is_taken_as_it_is(model, picture):
    image = picture(40, 50)
    predictor = Predictor(FusedDFN(model, return_border=True), flip=True)
    torch.testing.assert_close(
        predictor.probabilities(image), Predictor(model, flip=True).probabilities(image), rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(predictor.border(image), Predictor(model).border(image), rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="Border Network"):
        Predictor(FusedDFN(model)).border(image)
