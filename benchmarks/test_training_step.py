"""A training step, forward, backward and optimiser: the plain network against ours, from the same weights.

``pytest benchmarks/test_training_step.py --benchmark-only [-k synthetic] [--benchmark-json FILE]``. ``eager`` is
``ReferenceDFN`` as its users run it (channels_last, and autocast in bf16), ``compile`` the same compiled, ``ours``
``FastDFN`` as ``dfn_fast.train`` runs it; ``float32`` is the reference in eager float32 without channels_last, the 1 of
all ratios. On a GPU DFN-R18, R50 and R101 at 512 x 512, batch 32; on a CPU a small DFN-R18 in float32, and with
``--full`` the default recipe, DFN-R50 at 2 x 128 x 128, and bf16. Memory is what a step allocates beyond weights and
momentum, with its gradients and without.
"""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.harness import measure
from benchmarks.harness.training_trial import IMPLEMENTATIONS, TrainingTrial, shapes

pytestmark = [pytest.mark.timeout(1800), pytest.mark.training, pytest.mark.usefixtures("cudnn_by_trial")]


def trials() -> Iterator[Any]:
    for shape in shapes():
        for amp in ("off", "bf16") if measure.HAS_BF16 else ("off",):
            marks = [pytest.mark.full] if shape.full or amp != "off" else []
            yield pytest.param((shape, amp), id=shape.trial_name(amp).replace(" ", "-"), marks=marks)


@pytest.fixture(scope="module", params=trials())
def trial(request: pytest.FixtureRequest) -> TrainingTrial:
    """One network at one precision, kept while its implementations run."""
    return TrainingTrial(*request.param)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_training_step(trial, implementation, benchmark, notes):
    if implementation == "compile" and not trial.shape.compiles:
        pytest.skip("takes minutes to compile on a CPU, and trains slower than eager there")
    trial.check(implementation)
    call = functools.partial(trial.run, implementation)
    benchmark.group = trial.name
    benchmark.pedantic(lambda: (call(), measure.synchronize()), rounds=3, iterations=1, warmup_rounds=1)
    benchmark.extra_info.update(
        peak_memory_bytes=measure.peak_memory(call, warm=True),
        gradient_bytes=trial.gradient_bytes(implementation),
        held_after_forward_bytes=held_after_forward(trial, implementation),
    )
    trial.turns.add(implementation, call, trial.work(implementation), benchmark.extra_info)
    if implementation == "ours":
        trial.turns.time(benchmark.stats.stats.median, least=9)
        notes.append(line(trial))


def held_after_forward(trial: TrainingTrial, implementation: str) -> int:
    """Bytes that the forward pass leaves for the backward pass."""
    trainer = trial.trainer(implementation)

    def forward() -> torch.Tensor:
        trainer.model.train()
        with trainer.autocast():
            return trainer.loss(*trial.batch[:3])

    return measure.held_memory(forward)


def line(trial: TrainingTrial) -> str:
    """The row that the summary shows."""
    rows = trial.turns.rows
    ours, eager = rows["ours"], rows.get("eager", rows["ours"])
    speed_ups = ", ".join(f"{ours[f'speed_up_over_{name}']:.2f} x {name}" for name in rows if name != "ours")
    memory, held = (ours[name] / eager[name] for name in ("peak_memory_bytes", "held_after_forward_bytes"))
    activations, theirs = (row["peak_memory_bytes"] - row["gradient_bytes"] for row in (ours, eager))
    return (
        f"{trial.name}: ours {ours['median_ms']:.1f} ms, {ours['images_per_s']:.1f} images/s, "
        f"{ours['share_of_floor']:.0%} of the floor's speed, {speed_ups or 'alone'}; "
        f"peak memory {memory:.2f} x eager's ({activations / theirs:.2f} x without gradients), "
        f"held after forward {held:.2f} x"
    )
