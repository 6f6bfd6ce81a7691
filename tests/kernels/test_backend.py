"""Which implementation runs: by ``DFN_KERNELS``, by device, and by whether Triton is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dfn_kernels
from dfn_kernels.common import backend as _backend
from dfn_kernels.common.triton_or_stub import MISSING
from support.every_operator import differences, problems
from support.parity import DEVICE

ROOT = Path(__file__).resolve().parents[2]
REASON = "No module named 'triton'"
OPERATORS = sorted(set(dfn_kernels.__all__) - {"Packed", "conv3x3", "fused_conv"})  # these have no Triton kernel
needs_triton = pytest.mark.skipif(MISSING is not None, reason=f"needs Triton ({MISSING})")
needs_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="runs kernels on CPU tensors, in the interpreter")


def tensor_on(device: str) -> Any:
    """What a choice depends on, of a tensor on a device that need not be here (HIP devices are "cuda" too)."""
    return SimpleNamespace(device=torch.device(device), is_cuda=device == "cuda", numel=lambda: 1)


@pytest.fixture
def choose(monkeypatch):
    """The choice for a tensor, given both environment variables (None: unset) and why Triton is missing, if it is."""

    def use_triton(device: str, choice: str | None, interpret: str | None = None, missing: str | None = None) -> bool:
        for name, value in (("DFN_KERNELS", choice), ("TRITON_INTERPRET", interpret)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        monkeypatch.setattr(_backend, "MISSING", missing)
        return _backend.use_triton(tensor_on(device))

    return use_triton


@pytest.mark.parametrize("choice", [None, "auto"])
@pytest.mark.parametrize(
    ("device", "interpret", "missing", "expected"),
    [
        ("cuda", None, None, True),
        ("cuda", "1", None, True),
        ("cuda", None, REASON, False),
        ("cpu", None, None, False),
        ("cpu", "0", None, False),
        ("cpu", "1", None, True),
        ("cpu", "1", REASON, False),
        ("mps", "1", None, False),  # neither a GPU that Triton knows nor the interpreter's memory
        ("xpu", None, None, False),
    ],
)
def test_auto_takes_triton_where_it_serves(choose, choice, device, interpret, missing, expected):
    assert choose(device, choice, interpret, missing) is expected


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("missing", [None, REASON])
def test_torch_is_always_there(choose, device, missing):
    assert choose(device, "torch", "1", missing) is False


@pytest.mark.parametrize(("device", "interpret"), [("cuda", None), ("cpu", "1")])
def test_triton_is_forced(choose, device, interpret):
    assert choose(device, "triton", interpret) is True


@pytest.mark.parametrize(
    ("device", "interpret", "missing", "message"),
    [
        ("cuda", None, REASON, r"Triton cannot be imported \(No module named 'triton'\); pip install triton"),
        ("cpu", "1", REASON, r"Triton cannot be imported \(No module named 'triton'\)"),
        ("cpu", None, None, "no kernels for cpu tensors; use CUDA tensors, or TRITON_INTERPRET=1"),
        ("mps", "1", None, "no kernels for mps tensors"),
    ],
)
def test_forced_and_missing_is_an_error_that_says_why(choose, device, interpret, missing, message):
    with pytest.raises(RuntimeError, match=f"^DFN_KERNELS=triton, but .*{message}"):
        choose(device, "triton", interpret, missing)


@pytest.mark.parametrize("choice", ["Triton", "cuda", "torch ", ""])
def test_a_misspelt_choice_is_an_error_that_names_it(choose, choice):
    for device in ("cuda", "cpu"):
        with pytest.raises(RuntimeError, match=f"^DFN_KERNELS must be one of auto, torch, triton, got '{choice}'$"):
            choose(device, choice)


def test_every_operator_is_tried():
    assert sorted(problems()) == OPERATORS


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_asks(monkeypatch, name):
    """None decides for itself, as the fallback that serves silently would."""
    problem = problems()[name]
    monkeypatch.setenv("DFN_KERNELS", "trtion")
    with pytest.raises(RuntimeError, match=r"DFN_KERNELS must be one of .* got 'trtion'"):
        problem.operator(*problem.inputs)
    monkeypatch.setenv("DFN_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"^DFN_KERNELS=triton, but "):
        problem.operator(*problem.inputs)


@needs_triton
@needs_cpu
@pytest.mark.parametrize("name", OPERATORS)
def test_the_choice_is_what_runs(monkeypatch, name):
    """Forward and backward: kernels are launched where Triton is chosen, and none where PyTorch is."""
    from triton.runtime.jit import KernelInterface

    launched, getitem = [], KernelInterface.__getitem__

    def spy(kernel, grid):
        launched.append(kernel.__name__)
        return getitem(kernel, grid)

    monkeypatch.setattr(KernelInterface, "__getitem__", spy)
    problem = problems()[name]
    for choice in ("torch", "triton"):
        assert not launched
        monkeypatch.setenv("DFN_KERNELS", choice)
        assert max(differences(problem)) < 1e-12
    assert launched
    if problem.differentiable:
        assert any("bwd" in kernel or "collect" in kernel for kernel in launched)


STUB = 'raise ImportError("a stub stands in its place")\n'


@pytest.fixture(scope="module")
def without_triton(tmp_path_factory) -> dict[str, Any]:
    """What every_operator.py reports in a process in which Triton cannot be imported."""
    stub = tmp_path_factory.mktemp("stub")
    (stub / "triton").mkdir()
    (stub / "triton" / "__init__.py").write_text(STUB)
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DFN_KERNELS")}
    paths = (stub, ROOT, Path(dfn_kernels.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [sys.executable, str(Path(__file__).parents[1] / "support" / "every_operator.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_both_packages_import_without_triton(without_triton):
    assert without_triton["missing"] == "a stub stands in its place"


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_works_without_triton(without_triton, name):
    """Forward, and backward where it has one, equal to its definition; forced, it is an error that says why."""
    found = without_triton["differences"][name]
    assert len(found) > problems()[name].differentiable
    assert max(found) < 1e-12
    expected = "DFN_KERNELS=triton, but Triton cannot be imported (a stub stands in its place); pip install triton"
    assert without_triton["forced"].get(name) == expected
