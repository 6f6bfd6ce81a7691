import gc
import threading
import warnings

import pytest
import torch
from torch import nn

from dfn_fast.errors import ConfigError
from dfn_fast.inference.padding import bucketed, pad_corner
from dfn_fast.runtime.cuda_graph import WARM_UP
from dfn_fast.runtime.graph_cache import CudaGraphs, GraphCache
from support.stand_in_graphs import StandIn

PLENTY = 2**40
SIZES = [(1, 1, 1), (1, 5, 7), (1, 7, 5), (2, 8, 8), (1, 16, 3), (3, 4, 4)]  # two of 35 pixels; [B, H, W]
CHANNELS = torch.tensor([3, 5, 7])


def classes(images):
    """Labels that depend on each channel and, through the sum, on every pixel of an image."""
    values = (images.long() * CHANNELS.to(images.device)).sum(-1)
    return ((values + values.sum((1, 2), keepdim=True)) % 200).to(torch.uint8)


def random_images(size, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).to(device)


def input_bytes(*sizes):
    return sum(3 * b * h * w for b, h, w in sizes)


def check(cache, run, *images):
    assert all(torch.equal(cache(x), run(x)) for x in images)


def kept(cache):
    return [tuple(shape[:3]) for shape, _ in cache.kept]


def test_every_size_in_any_order_gives_what_eager_gives():
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=StandIn())
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    results = []
    for i in order:
        images = random_images(SIZES[i % len(SIZES)], i)
        results.append((cache(images), classes(images)))
    # Compared at the end: each is a tensor of its own, which later replays leave as it is.
    assert all(torch.equal(labels, expected) for labels, expected in results)
    counts = {"hits": 54, "captures": 6, "evictions": 0, "failures": 0}
    assert cache.statistics() == {**counts, "bytes": input_bytes(*SIZES)}


def test_the_images_of_the_caller_are_left_alone_and_may_be_strided():
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=StandIn())
    for seed in range(3):
        planar = random_images((2, 6, 9), seed).permute(0, 3, 1, 2).contiguous()
        images = planar.permute(0, 2, 3, 1)  # [B, H, W, 3] that is not contiguous
        before = images.clone()
        assert torch.equal(cache(images), classes(before))
        assert torch.equal(images, before)


def test_another_dtype_is_another_graph():
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=StandIn())
    images = random_images((1, 4, 4), 0)
    assert torch.equal(cache(images), cache(images.int()))
    assert cache.statistics()["captures"] == 2


def test_a_new_size_warms_up_before_its_capture_and_a_known_one_replays_between_wait_and_record():
    graphs, runs = StandIn(), []
    cache = GraphCache(lambda images: runs.append(None) or classes(images), limit_bytes=PLENTY, graphs=graphs)
    cache(random_images((1, 4, 4), 0))
    # Warming up waits as well: a replay on another stream may use the workspaces of the stream that warms up.
    assert graphs.calls == ["wait", "warm_up", "capture", "record", "wait", "replay", "record"]
    assert len(runs) == WARM_UP + 2  # the stand-in's capture and replay run too
    graphs.calls.clear()
    cache(random_images((1, 4, 4), 1))
    assert graphs.calls == ["wait", "replay", "record"]


def test_a_graph_of_inference_mode_serves_calls_without_and_with():
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=StandIn())
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
    cache = GraphCache(lambda images: images @ weight, limit_bytes=PLENTY, graphs=graphs)
    assert not cache(torch.ones(1, 2, 2, 3)).requires_grad
    graphs.error = lambda run: RuntimeError("no")
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        assert not cache(torch.ones(1, 3, 3, 3)).requires_grad


def test_the_graph_used_longest_ago_goes_first():
    a, b, c, d = (1, 4, 4), (1, 4, 5), (1, 5, 4), (1, 2, 4)
    cache = GraphCache(classes, limit_bytes=input_bytes(a, b, c), graphs=StandIn())
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
    cache = GraphCache(classes, limit_bytes=1500, graphs=graphs)
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
    cache = GraphCache(classes, limit_bytes=2500, graphs=graphs)
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
    cache = GraphCache(classes, limit_bytes=30_000, graphs=graphs)
    small, large = (1, 5, 5), (1, 6, 6)
    cache(random_images(small, 0))
    told = r"images \[1, 6, 6, 3\] .* takes 36,108 bytes, more than the 30,000 that graph_cache_bytes allows"
    with pytest.warns(UserWarning, match=told) as caught:
        check(cache, classes, *(random_images(large, seed) for seed in range(3)))
    assert len(caught) == 1
    assert [r() for r in graphs.inputs[1:]] == [None, None]  # tried beside the small one, then alone; neither is kept
    assert cache.statistics() == {"hits": 0, "captures": 3, "evictions": 1, "failures": 1, "bytes": 0}
    check(cache, classes, random_images(small, 1))
    assert kept(cache) == [small]


def test_a_failed_capture_warns_once_with_the_reason_and_still_answers():
    def error(run):
        return RuntimeError("operation not permitted when stream is capturing\nmore") if run().shape[1] == 6 else None

    graphs = StandIn(error=error)
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=graphs)
    told = r"images \[1, 6, 4, 3\] run without a CUDA graph: .* \(operation not permitted when stream is capturing\)$"
    with pytest.warns(UserWarning, match=told) as caught:
        check(cache, classes, *(random_images((1, 6, 4), seed) for seed in range(3)))
    assert len(caught) == 1
    assert graphs.calls == ["wait", "warm_up", "capture", "record"]
    check(cache, classes, random_images((1, 4, 4), 0))
    assert kept(cache) == [(1, 4, 4)]
    expected = {"hits": 0, "captures": 1, "evictions": 0, "failures": 1, "bytes": input_bytes((1, 4, 4))}
    assert cache.statistics() == expected
    assert graphs.pools == 2  # the failed one's has no graph that would keep it


def test_an_error_of_the_function_itself_is_the_callers():
    def run(images):
        if images.shape[1] == 6:
            raise ValueError("too tall")
        return classes(images)

    cache = GraphCache(run, limit_bytes=PLENTY, graphs=StandIn())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(ValueError, match="too tall"):
                cache(random_images((1, 6, 4), 0))
        images = random_images((1, 4, 4), 0)
        assert torch.equal(cache(images), classes(images))  # the lock is free


def test_a_replay_that_fails_is_waited_for_too():
    graphs = StandIn()
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=graphs)
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
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=graphs)
    cache(random_images((1, 4, 4), 0))
    cache.warm_up([[*size, 3] for size in [(1, 5, 7), (1, 1, 1), (3, 4, 4), (1, 4, 4), (2, 8, 8), (2, 8, 8)]])
    assert pixels == [16, 128, 48, 35, 1]
    assert graphs.calls.count("replay") == 1
    check(cache, classes, random_images((3, 4, 4), 0))
    assert {name: cache.statistics()[name] for name in ("hits", "captures")} == {"hits": 1, "captures": 5}


@pytest.mark.parametrize("limit", [PLENTY, 500])
def test_threads_with_sizes_of_their_own_get_their_own_answers(limit):
    cache = GraphCache(classes, limit_bytes=limit, graphs=StandIn())
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
    cache = GraphCache(classes, limit_bytes=input_bytes((1, 4, 5)), graphs=graphs)
    gc.disable()  # what a cycle holds would stay
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
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=graphs)
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
            GraphCache(classes, limit_bytes=limit, graphs=StandIn())
    cache = GraphCache(classes, limit_bytes=PLENTY, graphs=StandIn())
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


def needs_cuda(test):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))


GPU_SIZES = [(1, 96, 128), (2, 64, 64), (1, 33, 47), (4, 32, 96)]


def small_network():
    """``run`` on the GPU: convolutions with activations of 64 channels, far larger than the images."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 21, 1),
    ]
    network = nn.Sequential(*layers).cuda().eval()

    def run(images):
        return network(images.permute(0, 3, 1, 2).float() / 255).argmax(1).to(torch.uint8)

    return run


def cuda_cache(run, limit_bytes=PLENTY):
    return GraphCache(run, limit_bytes=limit_bytes, graphs=CudaGraphs(torch.device("cuda")))


@needs_cuda
def test_replays_on_a_gpu_give_what_eager_gives():
    run = small_network()
    cache = cuda_cache(run)
    results = []
    for seed in range(12):
        images = random_images(GPU_SIZES[seed % len(GPU_SIZES)], seed, "cuda")
        results.append((cache(images), run(images)))
    assert all(torch.equal(labels, expected) for labels, expected in results)
    assert len({int(labels.float().mean() * 1e4) for labels, _ in results}) > 6  # the images do decide
    statistics = cache.statistics()
    assert (statistics["captures"], statistics["hits"], statistics["failures"]) == (4, 8, 0)
    # The pool holds the activations of one size at least, two tensors of 64 channels in float32.
    assert statistics["bytes"] > 2 * 64 * 4 * 96 * 128


@needs_cuda
def test_a_call_on_a_gpu_does_not_wait_for_the_device():
    cache = cuda_cache(small_network())
    images = random_images(GPU_SIZES[0], 0, "cuda")
    cache(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_smaller_graphs_reuse_the_memory_of_the_largest():
    cache = cuda_cache(small_network())
    cache.warm_up([(1, 256, 256, 3)])
    largest = cache.statistics()["bytes"]
    cache.warm_up([(1, side, side, 3) for side in (64, 96, 128, 192)])
    assert cache.statistics()["captures"] == 5
    assert cache.statistics()["bytes"] < 1.5 * largest  # apart they would be nearly twice that


@needs_cuda
@pytest.mark.parametrize("evict", [False, True])
def test_threads_on_streams_of_their_own_share_the_pool(evict):
    run = small_network()
    cache = cuda_cache(run)
    cases = [[random_images(size, 10 * thread + i, "cuda") for i, size in enumerate(GPU_SIZES)] for thread in range(2)]
    expected = [[run(images) for images in case] for case in cases]
    if evict:  # room for the largest alone, about
        cache(cases[0][0])
        cache.limit_bytes = cache.statistics()["bytes"] + 1000
    torch.cuda.synchronize()
    wrong, start = [], threading.Barrier(2)

    def work(thread):
        try:
            stream = torch.cuda.Stream()
            start.wait()
            with torch.cuda.stream(stream):
                for i in range(10 if evict else 100):
                    j = (i + thread) % len(GPU_SIZES)
                    if not torch.equal(cache(cases[thread][j]), expected[thread][j]):
                        wrong.append((thread, i))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert (cache.statistics()["evictions"] > 0) == evict


@needs_cuda
def test_evicting_frees_the_memory_and_a_later_capture_finds_a_pool():
    run = small_network()
    images = random_images((1, 256, 256), 0, "cuda")
    expected = run(images)  # cuDNN and cuBLAS have their workspaces
    cache = cuda_cache(run)
    cache(images)
    cache.clear()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    assert torch.equal(cache(images), expected)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved() - before
    assert held >= 64 * 4 * 256 * 256
    cache.clear()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < held / 4
    assert torch.equal(cache(images), expected)
    assert cache.statistics()["failures"] == 0


@needs_cuda
def test_a_limit_too_small_on_a_gpu_runs_without_graphs():
    run = small_network()
    cache = cuda_cache(run, limit_bytes=1000)
    images = random_images((1, 64, 64), 0, "cuda")
    with pytest.warns(UserWarning, match="more than the 1,000 that graph_cache_bytes allows") as caught:
        check(cache, run, images, images)
    assert len(caught) == 1


@needs_cuda
def test_a_capture_that_fails_on_a_gpu_leaves_streams_and_generator_usable():
    network = small_network()

    def run(images):
        labels = network(images)
        if images.shape[1] == 64:
            labels[0, 0, 0].item()  # waits for the device, which no capture may
        return labels

    cache = cuda_cache(run)
    first, fails, later = (random_images((1, side, 64), side, "cuda") for side in (32, 64, 96))
    cache(first)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        with pytest.warns(UserWarning, match=r"images \[1, 64, 64, 3\] .* cannot be captured \(.*captur") as caught:
            check(cache, run, fails, fails)
        assert torch.cuda.current_stream() == stream
        assert not torch.cuda.is_current_stream_capturing()
    assert len(caught) == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(4, device="cuda").sum().item() > 0
    torch.cuda.empty_cache()
    for images in (first, later, first):
        assert torch.equal(cache(images), network(images))
    statistics = cache.statistics()
    assert (statistics["captures"], statistics["failures"]) == (2, 1)
