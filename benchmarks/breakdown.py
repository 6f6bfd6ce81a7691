"""``python -m benchmarks.breakdown [--only training|inference]``: where our time goes, by kind of operation.

Profiles the training step and the inference at several scales with flip that the other benchmarks measure, as they run
by default. On a GPU the step is compiled and inference replays a CUDA graph, so kernels are told apart by their names.
On a CPU nothing is compiled, so the parts of the network are shown as well. The tables go to
``benchmarks/results/MACHINE/breakdown_*.txt``; ``python -m benchmarks.report`` puts them into ``RESULTS.md``.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import measure
from benchmarks.harness.inference_trial import InferenceTrial
from benchmarks.harness.inference_trial import shapes as inference_shapes
from benchmarks.harness.measure import DEVICE
from benchmarks.harness.training_trial import TrainingTrial
from benchmarks.harness.training_trial import shapes as training_shapes
from benchmarks.reporting.results import RESULTS, machine_facts, machine_name
from dfn_fast import cli
from dfn_fast.files import write_text
from dfn_fast.runtime.device import HALVES, choose_algorithms
from dfn_fast.runtime.profiling import STEPS, WARM_UP, report
from dfn_fast.runtime.regions import named_regions

CUDA = DEVICE.type == "cuda"


def breakdown(name: str, call: Callable[[], Any]) -> str:
    """The profile of a few calls after some that compile, capture and choose algorithms."""
    for _ in range(WARM_UP):
        call()
    measure.synchronize()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA
    with nullcontext() if CUDA else named_regions(), profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(STEPS):
            call()
        measure.synchronize()
        seconds = time.perf_counter() - start
    return f"{name}\n{report(profiler.events(), STEPS, seconds, DEVICE.type, regions=not CUDA)}"


def training() -> str:
    """Profiles the largest network that the benchmark of the step compiles."""
    shape = [shape for shape in training_shapes() if shape.compiles][-1]
    choose_algorithms(deterministic=False)  # as `dfn_fast.train` does
    trial = TrainingTrial(shape, measure.default_amp())
    return breakdown(f"training step, {trial.name}", lambda: trial.run("ours"))


def inference() -> str:
    torch.backends.cudnn.benchmark = False
    shape = next(shape for shape in inference_shapes() if len(shape.scales) > 1)
    trial = InferenceTrial(shape, HALVES.get(measure.default_amp(), torch.float32))
    return breakdown(f"inference, {trial.name}", trial.function("ours"))


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m benchmarks.breakdown",
        usage="%(prog)s [--only NAME]",
        description="Profile a training step and inference, by kind of operation.",
    )
    makers = {"training": training, "inference": inference}
    parser.add_argument("--only", choices=tuple(makers), metavar="NAME", help="training or inference (default: both)")
    arguments = parser.parse_args(argv)
    folder = RESULTS / machine_name(machine_facts())
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in makers.items():
        if arguments.only in (None, name):
            text = make()
            print(text, end="\n\n")
            write_text(folder / f"breakdown_{name}.txt", text + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
