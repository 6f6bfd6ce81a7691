"""Each operator as ``eager`` (its definition), ``compile`` (torch.compile of the definition) and ``ours``.

``pytest benchmarks/ --benchmark-only [-k channel_attention] [-m training] [--benchmark-json FILE]``. On CUDA: the
shapes of DFN-R101 at 512 x 512, 21 classes, bfloat16; on a CPU: small shapes in float32, and the losses at 21 classes,
512 x 512, batch 4, where their memory is promised. On a CPU a short run takes one direction of each operator.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.harness import measure
from benchmarks.harness.cases import cpu_cases, gpu_cases
from benchmarks.harness.measure import DEVICE, Trial

pytestmark = pytest.mark.timeout(1800)  # torch.compile searches configurations on a GPU
FORWARD = ("upsample_cross_entropy",)  # all that a short run takes of it: compiled, its backward pass takes a second


def trials() -> Iterator[Any]:
    """Each case forward, and forward with backward if it trains."""
    for case in gpu_cases() if DEVICE.type == "cuda" else cpu_cases():
        for backward in (False, True) if case.training else (False,):
            marks = [pytest.mark.training if case.training else pytest.mark.inference]
            chosen = not case.training or backward == (case.operator not in FORWARD)
            marks += [] if chosen else [pytest.mark.full]
            name = f"{case.operator} {case.shape} {'forward+backward' if backward else 'forward'}"
            yield pytest.param((case, backward), id=name.replace(" ", "-"), marks=marks)


@pytest.fixture(scope="module", params=trials())
def trial(request: pytest.FixtureRequest) -> Trial:
    """One case in one direction, kept while its three implementations run."""
    return Trial(*request.param)


@pytest.mark.parametrize("implementation", measure.IMPLEMENTATIONS)
def test_operator(trial, implementation, benchmark, report):
    trial.check(implementation)

    def call() -> None:
        trial.run(implementation)
        measure.synchronize()

    def setup() -> None:
        measure.flush_cache()
        measure.synchronize()

    benchmark.group = trial.name
    benchmark.pedantic(call, setup=setup, rounds=measure.rounds_for(call), iterations=1, warmup_rounds=2)
    benchmark.extra_info.update(report.add(trial, implementation))
