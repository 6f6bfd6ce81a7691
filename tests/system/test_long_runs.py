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
# How much more the last third of a run may hold than the second, by its median; the first warms up. 670 iterations, or
# 170 images, lie between the two.
LIMITS = {
    # What a batch of the run takes, 8 KB, would be 5 MB more by then. Images: allocators keep holes between blocks of
    # sizes that never come again, some 3 MB of them; the smallest feature map of each, 64 KB, would be 11 MB more.
    "rss": {"train": 4 * MB, "predict": 8 * MB},
    # One for each iteration or image would be 670 or 170 more. torch forgets what its workers sent some hundreds later.
    "objects": {"train": 400, "predict": 20},
    "files": {"train": 0, "predict": 0},
    "threads": {"train": 0, "predict": 0},
    "tasks": {"train": 0, "predict": 0},
    "allocated": {"train": MB // 8, "predict": 4 * MB},  # CUDA graphs of the last sizes, in a cache of 16 MB
    "reserved": {"train": 2 * MB, "predict": 32 * MB},  # by segments of 2 or 20 MB
}


def grown(usage: list[dict[str, int]], run: str) -> dict[str, float]:
    """What grew beyond its limit, and by how much."""
    third = len(usage) // 3
    middle, last = usage[third : 2 * third], usage[-third:]
    growth = {name: median(x[name] for x in last) - median(x[name] for x in middle) for name in usage[0]}
    return {name: more for name, more in growth.items() if more > LIMITS[name][run]}


def usage_of(*words: str) -> list[dict[str, int]]:
    # One arena and one thread, so that memory does not depend on which thread asked for it; and few of oneDNN's
    # primitives, each with code of its own for a size: its cache, of 1,024 by default, fills up while it warms up.
    settings = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
    paths = os.pathsep.join(
        filter(None, [str(SCRIPT.parents[1]), str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH")])
    )
    # The kernels of a GPU; on a CPU PyTorch, and not Triton's interpreter.
    choices = {"PYTHONPATH": paths, "DFN_KERNELS": "auto", "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(SCRIPT), *words]
    done = subprocess.run(command, env=os.environ | settings | choices, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "leak"), [("rss", 20_000), ("objects", 1), ("files", 0.1), ("threads", 0.01), ("allocated", 512)]
)
def test_a_leak_is_seen(name, leak):
    """Of so much an iteration; noise that comes and goes is none."""
    noise = [{"rss": i % 3 * MB, "objects": i % 5 * 60, "files": 9, "threads": 3, "allocated": 0} for i in range(60)]
    assert grown(noise, "train") == {}
    leaking = [x | {name: int(x[name] + 33 * i * leak)} for i, x in enumerate(noise)]
    assert list(grown(leaking, "train")) == [name]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_images_leave_no_file_and_no_thread_open():
    """Of 60; for memory and objects a run must be long."""
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
