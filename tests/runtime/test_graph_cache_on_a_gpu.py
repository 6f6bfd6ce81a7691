"""The graph cache with real CUDA graphs: replays, streams, memory, and failed captures."""

import threading

import pytest
import torch
from torch import nn

from dfn_fast.runtime.graph_cache import CudaGraphs, GraphCache
from support.graph_calls import PLENTY, check, random_images

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = [(1, 96, 128), (2, 64, 64), (1, 33, 47), (4, 32, 96)]


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
    return GraphCache(run, limit_bytes=limit_bytes, graphs=CudaGraphs(torch.device("cuda")), capture_at=1)


def test_replays_on_a_gpu_give_what_eager_gives():
    run = small_network()
    cache = cuda_cache(run)
    results = []
    for seed in range(12):
        images = random_images(SIZES[seed % len(SIZES)], seed, "cuda")
        results.append((cache(images), run(images)))
    assert all(torch.equal(labels, expected) for labels, expected in results)
    assert len({int(labels.float().mean() * 1e4) for labels, _ in results}) > 6  # the labels depend on the images
    statistics = cache.statistics()
    assert (statistics["captures"], statistics["hits"], statistics["failures"]) == (4, 8, 0)
    # The pool holds at least the activations of one size: two float32 tensors with 64 channels.
    assert statistics["bytes"] > 2 * 64 * 4 * 96 * 128


def test_a_call_on_a_gpu_does_not_wait_for_the_device():
    cache = cuda_cache(small_network())
    images = random_images(SIZES[0], 0, "cuda")
    cache(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_smaller_graphs_reuse_the_memory_of_the_largest():
    cache = cuda_cache(small_network())
    cache.warm_up([(1, 256, 256, 3)])
    largest = cache.statistics()["bytes"]
    cache.warm_up([(1, side, side, 3) for side in (64, 96, 128, 192)])
    assert cache.statistics()["captures"] == 5
    assert cache.statistics()["bytes"] < 1.5 * largest  # separate pools would need nearly twice that


@pytest.mark.parametrize("evict", [False, True])
def test_threads_on_streams_of_their_own_share_the_pool(evict):
    run = small_network()
    cache = cuda_cache(run)
    cases = [[random_images(size, 10 * thread + i, "cuda") for i, size in enumerate(SIZES)] for thread in range(2)]
    expected = [[run(images) for images in case] for case in cases]
    if evict:  # room for about the largest only
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
                    j = (i + thread) % len(SIZES)
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


def test_evicting_frees_the_memory_and_a_later_capture_finds_a_pool():
    run = small_network()
    images = random_images((1, 256, 256), 0, "cuda")
    expected = run(images)  # allocates the workspaces of cuDNN and cuBLAS
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


def test_a_limit_too_small_on_a_gpu_runs_without_graphs():
    run = small_network()
    cache = cuda_cache(run, limit_bytes=1000)
    images = random_images((1, 64, 64), 0, "cuda")
    with pytest.warns(UserWarning, match="more than the 1,000 that graph_cache_bytes allows") as caught:
        check(cache, run, images, images)
    assert len(caught) == 1


def test_a_capture_that_fails_on_a_gpu_leaves_streams_and_generator_usable():
    network = small_network()

    def run(images):
        labels = network(images)
        if images.shape[1] == 64:
            labels[0, 0, 0].item()  # waits for the device, which a capture must not do
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
