"""Inference from uint8 images to labels: the plain network against ours, from the same weights.

``pytest benchmarks/test_inference.py --benchmark-only [-k scales] [--benchmark-json FILE]``. ``float32`` is
``ReferenceDFN`` in eager float32, the 1 of all ratios; ``eager`` the same in channels_last and the precision of the
row; ``compile`` that compiled (on a GPU in ``--compile-mode``, on a CPU with frozen weights); ``ours`` the
``Predictor``. With several scales theirs is the direct loop: ``cv2.resize``, the network and a resize for each scale
and mirror image; with windows likewise, one batch of windows after the other, scores added at the image's size.
On a GPU DFN-R101 at 512 x 512 with batch 1 and 16, at 1024 x 2048 and at 4096 x 4096 in windows; on a CPU DFN-R18 at
128 x 128 in float32, and with ``--full`` DFN-R101 at 256 x 256, several scales, DFN-R18 in windows, and bf16.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.harness import measure
from benchmarks.harness.inference_trial import InferenceTrial, shapes
from benchmarks.harness.machine import name_of

pytestmark = [pytest.mark.timeout(1800), pytest.mark.inference]
IMPLEMENTATIONS = ("float32", "eager", "compile", "ours")


def trials() -> Iterator[Any]:
    for shape in shapes():
        for dtype in (torch.float32, torch.bfloat16) if measure.HAS_BF16 else (torch.float32,):
            marks = [pytest.mark.full] if shape.full or dtype != torch.float32 else []
            yield pytest.param((shape, dtype), id=f"{shape.name} {name_of(dtype)}".replace(" ", "-"), marks=marks)


@pytest.fixture(scope="module", params=trials())
def trial(request: pytest.FixtureRequest) -> InferenceTrial:
    return InferenceTrial(*request.param)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inference(trial, implementation, benchmark, notes):
    if implementation == "compile" and len(trial.shape.scales) > 1:
        pytest.skip("compiles for minutes, once for each size")
    trial.check(implementation)
    call = trial.function(implementation)
    benchmark.group = trial.name
    benchmark.pedantic(lambda: (call(), measure.synchronize()), rounds=1, iterations=1)
    benchmark.extra_info.update(peak_memory_bytes=measure.peak_memory(call, warm=True))
    if implementation == "compile" and measure.COMPILE_MODE:
        benchmark.extra_info["compile_mode"] = measure.COMPILE_MODE
    trial.turns.add(implementation, call, trial.work(implementation), benchmark.extra_info)
    if implementation == "ours":
        trial.turns.time(benchmark.stats.stats.median, least=3)
        notes.append(line(trial))


def line(trial: InferenceTrial) -> str:
    """The row that the summary shows."""
    rows = trial.turns.rows
    ours = rows["ours"]
    ratios = ", ".join(f"{ours[f'speed_up_over_{name}']:.2f} x {name}" for name in rows if name != "ours")
    plain = rows.get("float32", ours)
    return (
        f"{trial.name}: ours {ours['median_ms']:.1f} ms, {ours['images_per_s']:.2f} images/s, "
        f"{ours['share_of_floor']:.0%} of the floor's speed, {ratios or 'alone'}; "
        f"peak memory {ours['peak_memory_bytes'] / plain['peak_memory_bytes']:.2f} x float32's"
    )
