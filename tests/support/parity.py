"""Compares an operator with its definition in float64: outputs and every gradient, with an earned tolerance."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates float32 to bfloat16 instead of rounding, so bfloat16 is compared on a GPU only.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def random_like(x: Tensor, seed: int = 1) -> Tensor:
    """A random output gradient for ``x``."""
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def run(fn: Callable, inputs: Sequence[Tensor], d_out: Tensor | None = None) -> dict[str, Tensor]:
    """fn's output and the gradient of each floating-point input, by name; ``d_out`` defaults to a random one."""
    inputs = [x.detach().clone(memory_format=torch.preserve_format) for x in inputs]
    wanted = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    out = fn(*inputs)
    d_out = random_like(out) if d_out is None else d_out.to(out.dtype)
    gradients = torch.autograd.grad(out, wanted, d_out)
    return {"out": out.detach(), **{f"gradient {i}": g for i, g in enumerate(gradients)}}


def assert_no_worse_than(ref: Callable, fn: Callable, inputs: Sequence[Tensor], factor: float = 2.0) -> None:
    """Asserts that fn's largest error against a float64 run of ref is at most ``factor`` times ref's own at the inputs'
    dtypes, plus one eps of the largest value. The one tolerance of this project; nothing loosens it."""
    exact_inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    theirs = run(ref, inputs)
    d_out = random_like(theirs["out"])
    ours, theirs, exact = run(fn, inputs, d_out), run(ref, inputs, d_out), run(ref, exact_inputs, d_out)
    for name, truth in exact.items():
        assert ours[name].shape == truth.shape, f"{name}: shape {list(ours[name].shape)}, expected {list(truth.shape)}"
        assert ours[name].dtype == theirs[name].dtype, f"{name}: {ours[name].dtype}, expected {theirs[name].dtype}"
        assert ours[name].isfinite().all(), f"{name} is not finite"
        error, baseline = ((r[name].double() - truth).abs().max().item() for r in (ours, theirs))
        slack = torch.finfo(theirs[name].dtype).eps * truth.abs().max().item()
        assert error <= factor * baseline + slack, f"{name}: error {error:.2e}, PyTorch's own {baseline:.2e}"
