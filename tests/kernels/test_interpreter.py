"""The interpreter as these tests run it, against Triton's original."""

import inspect

import pytest
import torch

from dfn_kernels.common.triton_or_stub import MISSING
from support.every_operator import problems, results
from support.parity import DEVICE
from support.tiers import slow

pytestmark = pytest.mark.skipif(DEVICE != "cpu" or MISSING is not None, reason="runs in Triton's interpreter")


QUICK = ("upsample_add", "multiscale_argmax")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else slow) for name in problems()])
def test_leaving_out_needless_work_changes_no_bit(triton_backend, monkeypatch, name):
    from triton.runtime import interpreter

    problem = problems()[name]
    quick = results(problem.operator, problem)
    options, replace_functions = interpreter.InterpreterOptions(), inspect.unwrap(interpreter._patch_builtin)
    assert options != interpreter.interpreter_builder.options
    assert replace_functions is not interpreter._patch_builtin
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    monkeypatch.setattr(interpreter, "_patch_builtin", replace_functions)
    for one, other in zip(quick, results(problem.operator, problem), strict=True):
        assert torch.equal(one, other)
