"""Debug mode, ``DFN_KERNELS_DEBUG=1``: a device error is raised by the operator whose kernel caused it, by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfn_kernels.common import backend as _backend
from support.every_operator import Problem, convolutions, problems, results
from support.parity import DEVICE


def with_valid_labels(problem: Problem) -> Problem:
    """Others are an error of their own in debug mode."""
    first, *rest = problem.inputs
    return problem._replace(inputs=(first, *(x.where(x < 2, 255) if x.dtype == torch.uint8 else x for x in rest)))


EVERY = {name: with_valid_labels(problem) for name, problem in (problems() | convolutions()).items()}
DIFFERENTIABLE = [name for name, problem in EVERY.items() if problem.differentiable]
# As it is registered: with probabilities it has another signature.
REGISTERED = {name: name for name in EVERY} | {"multiscale_argmax": "multiscale_scores"}
FAULT = "CUDA error: an illegal memory access was encountered"
# What runs backward; both losses share one operator.
BACKWARD = {name: f"{name}_bwd" for name in DIFFERENTIABLE} | {
    "upsample_cross_entropy": "upsample_loss_bwd",
    "upsample_focal_loss": "upsample_loss_bwd",
    "conv3x3": "conv3x3_bwd_input",
}


@pytest.fixture
def device(monkeypatch):
    """Stands in for a device that fails when it is waited for the ``fails_at``-th time (from 1), and counts."""

    class Device:
        waits, fails_at = 0, 0

        def synchronize(self, device: torch.device) -> None:
            self.waits += 1
            if self.waits == self.fails_at:
                raise RuntimeError(FAULT)

    stand_in = Device()
    monkeypatch.setattr(_backend, "synchronize", stand_in.synchronize)
    return stand_in


@pytest.fixture
def debug(monkeypatch) -> None:
    monkeypatch.setenv("DFN_KERNELS_DEBUG", "1")


@pytest.mark.parametrize("name", EVERY)
def test_nothing_waits_without_it(device, name):
    results(EVERY[name].operator, EVERY[name])
    assert device.waits == 0


@pytest.mark.parametrize("name", EVERY)
def test_results_are_the_same_with_it(device, debug, name):
    problem = EVERY[name]
    for ours, expected in zip(results(problem.operator, problem), results(problem.definition, problem), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert device.waits >= (4 if problem.differentiable else 2)  # before and after, forward and backward


@pytest.mark.parametrize("name", EVERY)
def test_a_fault_is_raised_by_the_operator_with_its_shapes(device, debug, name):
    problem, device.fails_at = EVERY[name], 2
    shape = ", ".join(map(str, problem.inputs[0].shape))
    with pytest.raises(RuntimeError, match=rf"^{REGISTERED[name]}, \w+ \[{shape}\] \w+ on cpu.*: {FAULT}$"):
        problem.operator(*problem.inputs)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_fault_of_the_backward_pass_is_raised_as_one(device, debug, name):
    problem = EVERY[name]
    inputs = [x.detach().requires_grad_(i < problem.differentiable) for i, x in enumerate(problem.inputs)]
    out = problem.operator(*inputs)
    device.fails_at = device.waits + 2
    with pytest.raises(RuntimeError, match=rf"^{BACKWARD[name]}, d_\w+ \[.*: {FAULT}"):
        out.sum().backward()


def test_a_fault_that_was_there_before_is_said_to_be_anothers(device, debug):
    problem, device.fails_at = EVERY["upsample_add"], 1
    with pytest.raises(RuntimeError, match=rf"^an operation before upsample_add, low \[2, 3, 4, 5\].*: {FAULT}$"):
        problem.operator(*problem.inputs)


@pytest.mark.parametrize("name", problems())
def test_what_triton_raises_is_named_too(monkeypatch, triton_backend, debug, name):
    """A kernel that cannot be compiled or launched."""
    from triton.runtime.jit import KernelInterface

    def refuse(kernel, grid):
        raise TypeError("out of resources: shared memory")

    monkeypatch.setattr(KernelInterface, "__getitem__", refuse)
    with pytest.raises(RuntimeError, match=rf"^{REGISTERED[name]}, .*\[.*: out of resources: shared memory$") as raised:
        EVERY[name].operator(*EVERY[name].inputs)
    assert isinstance(raised.value.__cause__, TypeError)


@pytest.mark.parametrize("error", [ValueError("wrong"), torch.OutOfMemoryError("full")])
def test_errors_that_callers_tell_apart_stay_what_they_are(monkeypatch, debug, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("dfn_kernels.attention.upsample_add.resize_torch", fail)
    problem = EVERY["upsample_add"]
    with pytest.raises(type(error)) as raised:
        problem.operator(*problem.inputs)
    assert raised.value is error


def test_compiled_operators_wait_as_well(device, debug):
    problem = EVERY["upsample_add"]
    compiled = torch.compile(problem.operator, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*problem.inputs), problem.definition(*problem.inputs))
    assert device.waits == 2
    device.fails_at = 4
    with pytest.raises(RuntimeError, match=r"^upsample_add, low \[2, 3, 4, 5\]"):
        compiled(*problem.inputs)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("debugging", [False, True])
def test_an_illegal_address_on_a_gpu_is_named(debugging):
    """In a process of its own, whose CUDA context is lost with it."""
    environment = os.environ | {"DFN_KERNELS_DEBUG": "1" if debugging else "0"}
    command = [sys.executable, str(Path(__file__).parents[1] / "support" / "wild_read.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    last = [line for line in done.stderr.splitlines() if "Error" in line][-1]
    assert ("upsample_add, low [1, 8, 512, 512] float32 on cuda:0" in done.stderr) == debugging, last
    assert "illegal memory access" in done.stderr
