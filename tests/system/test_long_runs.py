"""Nothing grows over 2,000 iterations or 500 images of different sizes: memory, objects, file handles, threads."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "support" / "long_runs.py"
CUDA = torch.cuda.is_available()
MB = 1 << 20
# How much the median of a run's last third may exceed that of the second; the first is the warm-up. 670 iterations, or
# 170 images, lie between the two.
LIMITS = {
    # Keeping each batch, 8 KB, would add 5 MB. For images, allocators keep about 3 MB of holes between blocks whose
    # sizes do not recur; keeping each image's smallest feature map, 64 KB, would add 11 MB.
    "rss": {"train": 4 * MB, "predict": 8 * MB},
    # One for each iteration or image would add 670 or 170. torch frees what its workers sent some hundreds later.
    "objects": {"train": 400, "predict": 20},
    "files": {"train": 0, "predict": 0},
    "threads": {"train": 0, "predict": 0},
    "tasks": {"train": 0, "predict": 0},
    "allocated": {"train": MB // 8, "predict": 4 * MB},  # CUDA graphs of the latest sizes, in a cache of 16 MB
    "reserved": {"train": 2 * MB, "predict": 32 * MB},  # grows in segments of 2 or 20 MB
}


def grown(usage: list[dict[str, int]], run: str) -> dict[str, float]:
    """The resources that grew beyond their limits, and by how much."""
    third = len(usage) // 3
    middle, last = usage[third : 2 * third], usage[-third:]
    growth = {name: median(x[name] for x in last) - median(x[name] for x in middle) for name in usage[0]}
    return {name: more for name, more in growth.items() if more > LIMITS[name][run]}


def usage_of(*words: str) -> list[dict[str, int]]:
    # One arena and one thread, so that memory does not depend on which thread asked for it. A small oneDNN cache, which
    # fills up during the warm-up: it holds compiled code for each size, for 1,024 primitives by default.
    settings = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
    paths = os.pathsep.join(
        filter(None, [str(SCRIPT.parents[1]), str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH")])
    )
    # The Triton kernels on a GPU; on a CPU PyTorch, not Triton's interpreter.
    choices = {"PYTHONPATH": paths, "DFN_KERNELS": "auto", "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(SCRIPT), *words]
    done = subprocess.run(command, env=os.environ | settings | choices, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "leak"), [("rss", 20_000), ("objects", 1), ("files", 0.1), ("threads", 0.01), ("allocated", 512)]
)
def test_a_leak_is_seen(name, leak):
    """``leak`` is the growth per iteration. Noise that comes and goes is not a leak."""
    noise = [{"rss": i % 3 * MB, "objects": i % 5 * 60, "files": 9, "threads": 3, "allocated": 0} for i in range(60)]
    assert grown(noise, "train") == {}
    leaking = [x | {name: int(x[name] + 33 * i * leak)} for i, x in enumerate(noise)]
    assert list(grown(leaking, "train")) == [name]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_images_leave_no_file_and_no_thread_open():
    """Predicts 60 images. Memory and objects need a longer run."""
    usage = usage_of("predict", "60")
    assert len(usage) == 6
    assert {"files", "threads", "tasks"} & grown(usage, "predict").keys() == set()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu) if CUDA else "cpu"])
def test_nothing_grows_over_2000_iterations(tmp_path, device):
    usage = usage_of("train", str(tmp_path))
    assert len(usage) == 80
    assert ("allocated" in usage[0]) == (device == "cuda")
    assert grown(usage, "train") == {}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu) if CUDA else "cpu"])
def test_nothing_grows_over_500_images_of_different_sizes(device):
    usage = usage_of("predict", "500")
    assert len(usage) == 50
    assert ("allocated" in usage[0]) == (device == "cuda")
    assert grown(usage, "predict") == {}
