"""The graph cache on a stand-in for the device: captures, replays and evictions."""

import gc
import threading
import warnings

import pytest
import torch

from dfn_fast.errors import ConfigError
from dfn_fast.inference.padding import bucketed, pad_corner
from dfn_fast.runtime.cuda_graph import WARM_UP
from dfn_fast.runtime.graph_cache import GraphCache
from support.graph_calls import PLENTY, check, random_images
from support.stand_in_graphs import StandIn

SIZES = [(1, 1, 1), (1, 5, 7), (1, 7, 5), (2, 8, 8), (1, 16, 3), (3, 4, 4)]  # two of 35 pixels; [B, H, W]
CHANNELS = torch.tensor([3, 5, 7])


def classes(images):
    """Labels that depend on each channel and, through the sum, on every pixel of an image."""
    values = (images.long() * CHANNELS.to(images.device)).sum(-1)
    return ((values + values.sum((1, 2), keepdim=True)) % 200).to(torch.uint8)


def input_bytes(*sizes):
    return sum(3 * b * h * w for b, h, w in sizes)


def kept(cache):
    return [tuple(shape[:3]) for shape, _ in cache.kept]


def test_every_size_in_any_order_gives_what_eager_gives():
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=StandIn(), capture_at=1)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    results = []
    for i in order:
        images = random_images(SIZES[i % len(SIZES)], i)
        results.append((cache(images), classes(images)))
    # Compared at the end: each result is a separate tensor that later replays do not overwrite.
    assert all(torch.equal(labels, expected) for labels, expected in results)
    counts = {"hits": 54, "captures": 6, "evictions": 0, "failures": 0}
    assert cache.statistics() == {**counts, "bytes": input_bytes(*SIZES)}


def test_a_size_is_captured_when_it_comes_the_third_time():
    graphs = StandIn()
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=graphs)
    for size in ((1, 4, 4), (1, 5, 5), (1, 4, 4), (1, 5, 5)):
        images = random_images(size, 0)
        assert torch.equal(cache(images), classes(images))
    assert graphs.calls == []
    images = random_images((1, 4, 4), 0)
    assert torch.equal(cache(images), classes(images))
    assert cache.statistics()["captures"] == 1
    cache.warm_up([(1, 6, 6, 3)])  # which captures at once
    assert cache.statistics()["captures"] == 2


def test_without_a_limit_a_quarter_of_the_free_memory_is_one():
    cache = GraphCache(classes, graphs=StandIn())
    assert cache.limit_bytes == StandIn().free_bytes() // 4 == 1 << 31


def test_the_images_of_the_caller_are_left_alone_and_may_be_strided():
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=StandIn(), capture_at=1)
    for seed in range(3):
        planar = random_images((2, 6, 9), seed).permute(0, 3, 1, 2).contiguous()
        images = planar.permute(0, 2, 3, 1)  # [B, H, W, 3], not contiguous
        before = images.clone()
        assert torch.equal(cache(images), classes(before))
        assert torch.equal(images, before)


def test_another_dtype_is_another_graph():
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=StandIn(), capture_at=1)
    images = random_images((1, 4, 4), 0)
    assert torch.equal(cache(images), cache(images.int()))
    assert cache.statistics()["captures"] == 2


def test_a_new_size_warms_up_before_its_capture_and_a_known_one_replays_between_wait_and_record():
    graphs, runs = StandIn(), []
    cache = GraphCache(
        lambda images: runs.append(None) or classes(images), limit_bytes=PLENTY, graphs=graphs, capture_at=1
    )
    cache(random_images((1, 4, 4), 0))
    # Warming up waits as well: a replay on another stream may use the workspaces of the stream that warms up.
    assert graphs.calls == ["wait", "warm_up", "capture", "record", "wait", "replay", "record"]
    assert len(runs) == WARM_UP + 2  # the stand-in's capture and replay also run the function
    graphs.calls.clear()
    cache(random_images((1, 4, 4), 1))
    assert graphs.calls == ["wait", "replay", "record"]


def test_a_graph_of_inference_mode_serves_calls_without_and_with():
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=StandIn(), capture_at=1)
    with torch.inference_mode():
        cache(random_images((1, 4, 4), 0))
    images = random_images((1, 4, 4), 1)
    labels = cache(images)
    assert torch.equal(labels, classes(images))
    assert not labels.is_inference()
    with torch.inference_mode():
        assert torch.equal(cache(images), labels)


def test_the_function_runs_without_gradients():
    weight = torch.ones(3, requires_grad=True)
    graphs = StandIn()
    cache = GraphCache(lambda images: images @ weight, limit_bytes=PLENTY, graphs=graphs, capture_at=1)
    assert not cache(torch.ones(1, 2, 2, 3)).requires_grad
    graphs.error = lambda run: RuntimeError("no")
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        assert not cache(torch.ones(1, 3, 3, 3)).requires_grad


def test_the_graph_used_longest_ago_goes_first():
    a, b, c, d = (1, 4, 4), (1, 4, 5), (1, 5, 4), (1, 2, 4)
    cache = GraphCache(classes, limit_bytes=input_bytes(a, b, c), graphs=StandIn(), capture_at=1)
    for size in (a, b, c, a):  # exactly the limit
        cache(random_images(size, 0))
    assert kept(cache) == [b, c, a]
    cache(random_images(d, 0))
    assert kept(cache) == [c, a, d]
    check(cache, classes, random_images(b, 1))  # captured again
    assert kept(cache) == [a, d, b]
    bytes_now = input_bytes(a, d, b)
    assert cache.statistics() == {"hits": 1, "captures": 5, "evictions": 2, "failures": 0, "bytes": bytes_now}


@pytest.mark.parametrize("fragmented", [False, True])
def test_the_bytes_stay_within_the_limit(fragmented):
    graphs = StandIn(size=lambda output: 10 * output.numel(), fragmented=fragmented)
    cache = GraphCache(classes, limit_bytes=1500, graphs=graphs, capture_at=1)
    order = torch.randint(0, len(SIZES), (80,), generator=torch.Generator().manual_seed(0)).tolist()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed, i in enumerate(order):
            images = random_images(SIZES[i], seed)
            assert torch.equal(cache(images), classes(images))
            assert cache.statistics()["bytes"] == graphs.held() + (graphs.reserved if cache.kept else 0) <= 1500
    # 128 pixels need 1280 + 384 bytes; the next largest, 48, need 480 + 144.
    assert [str(w.message)[:22] for w in caught] == ["images [2, 8, 8, 3] ru"]
    assert (cache.statistics()["evictions"] > 5) == fragmented


def test_a_pool_that_has_outgrown_the_limit_is_given_up_for_a_fresh_one():
    a, b, c = (1, 10, 10), (1, 9, 10), (1, 8, 10)
    graphs = StandIn(size=lambda output: 10 * output.numel(), fragmented=True)
    cache = GraphCache(classes, limit_bytes=2500, graphs=graphs, capture_at=1)
    cache(random_images(a, 0))
    cache(random_images(b, 0))
    assert graphs.pools == 1
    assert cache.statistics()["bytes"] == 1000 + 900 + input_bytes(a, b)
    check(cache, classes, random_images(c, 0))
    assert graphs.pools == 2
    assert kept(cache) == [c]
    expected = {"hits": 0, "captures": 4, "evictions": 2, "failures": 0, "bytes": 800 + input_bytes(c)}
    assert cache.statistics() == expected


def test_a_limit_too_small_for_one_graph_warns_once_and_runs_without():
    graphs = StandIn(size=lambda output: 1000 * output.numel())
    cache = GraphCache(classes, limit_bytes=30_000, graphs=graphs, capture_at=1)
    small, large = (1, 5, 5), (1, 6, 6)
    cache(random_images(small, 0))
    told = r"images \[1, 6, 6, 3\] .* takes 36,108 bytes, more than the 30,000 that graph_cache_bytes allows"
    with pytest.warns(UserWarning, match=told) as caught:
        check(cache, classes, *(random_images(large, seed) for seed in range(3)))
    assert len(caught) == 1
    assert [r() for r in graphs.inputs[1:]] == [None, None]  # tried with the small one, then without; neither is kept
    assert cache.statistics() == {"hits": 0, "captures": 3, "evictions": 1, "failures": 1, "bytes": 0}
    check(cache, classes, random_images(small, 1))
    assert kept(cache) == [small]


def test_a_failed_capture_warns_once_with_the_reason_and_still_answers():
    def error(run):
        return RuntimeError("operation not permitted when stream is capturing\nmore") if run().shape[1] == 6 else None

    graphs = StandIn(error=error)
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=graphs, capture_at=1)
    told = r"images \[1, 6, 4, 3\] run without a CUDA graph: .* \(operation not permitted when stream is capturing\)$"
    with pytest.warns(UserWarning, match=told) as caught:
        check(cache, classes, *(random_images((1, 6, 4), seed) for seed in range(3)))
    assert len(caught) == 1
    assert graphs.calls == ["wait", "warm_up", "capture", "record"]
    check(cache, classes, random_images((1, 4, 4), 0))
    assert kept(cache) == [(1, 4, 4)]
    expected = {"hits": 0, "captures": 1, "evictions": 0, "failures": 1, "bytes": input_bytes((1, 4, 4))}
    assert cache.statistics() == expected
    assert graphs.pools == 2  # no graph keeps the failed capture's pool


def test_an_error_of_the_function_itself_is_the_callers():
    def run(images):
        if images.shape[1] == 6:
            raise ValueError("too tall")
        return classes(images)

    cache = GraphCache(run, limit_bytes=PLENTY, graphs=StandIn(), capture_at=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(ValueError, match="too tall"):
                cache(random_images((1, 6, 4), 0))
        images = random_images((1, 4, 4), 0)
        assert torch.equal(cache(images), classes(images))  # the lock was released


def test_a_replay_that_fails_is_waited_for_too():
    graphs = StandIn()
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=graphs, capture_at=1)
    images = random_images((1, 4, 4), 0)
    cache(images)
    graph = next(iter(cache.kept.values()))
    replay = graph.replay

    def fails():
        raise torch.OutOfMemoryError("out of memory")

    graph.replay = fails
    with pytest.raises(torch.OutOfMemoryError):
        cache(images)
    assert graphs.calls[-2:] == ["wait", "record"]
    graph.replay = replay
    assert torch.equal(cache(images), classes(images))


def test_warming_up_captures_the_largest_first():
    pixels = []
    graphs = StandIn(size=lambda output: pixels.append(output.numel()) or 0)
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=graphs, capture_at=1)
    cache(random_images((1, 4, 4), 0))
    cache.warm_up([[*size, 3] for size in [(1, 5, 7), (1, 1, 1), (3, 4, 4), (1, 4, 4), (2, 8, 8), (2, 8, 8)]])
    assert pixels == [16, 128, 48, 35, 1]
    assert graphs.calls.count("replay") == 1
    check(cache, classes, random_images((3, 4, 4), 0))
    assert {name: cache.statistics()[name] for name in ("hits", "captures")} == {"hits": 1, "captures": 5}


@pytest.mark.parametrize("limit", [PLENTY, 500])
def test_threads_with_sizes_of_their_own_get_their_own_answers(limit):
    cache = GraphCache(classes, limit_bytes=limit, graphs=StandIn(), capture_at=1)
    start, wrong = threading.Barrier(8), []

    def work(thread):
        try:
            start.wait()
            for i in range(40):
                images = random_images(SIZES[(thread + i) % len(SIZES)], 100 * thread + i)
                if not torch.equal(cache(images), classes(images)):
                    wrong.append((thread, i))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    statistics = cache.statistics()
    assert statistics["hits"] + statistics["captures"] == 320
    assert (statistics["evictions"] > 0) == (limit == 500)


def test_an_evicted_graph_leaves_nothing_behind_and_goes_once_the_device_is_done_with_it():
    graphs, alive_at_finish = StandIn(), []
    graphs.finish = lambda: alive_at_finish.append(graphs.inputs[0]() is not None)
    cache = GraphCache(classes, limit_bytes=input_bytes((1, 4, 5)), graphs=graphs, capture_at=1)
    gc.disable()  # memory held by a reference cycle would stay
    try:
        cache(random_images((1, 4, 4), 0))
        assert [r() is None for r in graphs.inputs + graphs.outputs] == [False, False]
        cache(random_images((1, 4, 5), 0))
        assert [r() is None for r in graphs.inputs] == [True, False]
        assert [r() is None for r in graphs.outputs] == [True, False]
        assert alive_at_finish == [True]
    finally:
        gc.enable()


def test_clearing_drops_every_graph_and_the_pool():
    graphs = StandIn(size=lambda output: 10)
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=graphs, capture_at=1)
    for size in SIZES:
        cache(random_images(size, 0))
    cache.clear()
    assert [r() for r in graphs.inputs + graphs.outputs] == [None] * 12
    assert cache.statistics() == {"hits": 0, "captures": 6, "evictions": 6, "failures": 0, "bytes": 0}
    check(cache, classes, random_images(SIZES[1], 1))
    assert graphs.pools == 2


def test_bad_arguments_are_named():
    for limit in (0, -1):
        with pytest.raises(ConfigError, match=f"graph_cache_bytes {limit}: expected a positive number"):
            GraphCache(classes, limit_bytes=limit, graphs=StandIn(), capture_at=1)
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=StandIn(), capture_at=1)
    with pytest.raises(ValueError, match="expected images on cpu, got meta"):
        cache(random_images((1, 4, 4), 0).to("meta"))


def test_sizes_round_up_to_their_bucket():
    assert bucketed((1, 64), 32) == (32, 64)
    assert bucketed((65, 63), 32) == (96, 64)
    assert bucketed((375, 500), 1) == (375, 500)
    with pytest.raises(ValueError, match="multiple 0: expected at least 1"):
        bucketed((1, 1), 0)


def test_padding_is_the_mean_colour_below_and_to_the_right():
    images = random_images((2, 3, 5), 0)
    padded = pad_corner(images, (4, 8))
    assert padded.shape == (2, 4, 8, 3)
    assert padded.dtype == torch.uint8
    assert torch.equal(padded[:, :3, :5], images)
    assert (padded[:, 3:] == torch.tensor([124, 116, 104], dtype=torch.uint8)).all()
    assert (pad_corner(images, (4, 8), (1, 2, 3))[:, :, 5:] == torch.tensor([1, 2, 3], dtype=torch.uint8)).all()
    assert pad_corner(images, (3, 5)) is images
    for size in ((2, 5), (3, 4)):
        with pytest.raises(ValueError, match=f"images of 3x5 cannot be padded to {size[0]}x{size[1]}"):
            pad_corner(images, size)
