"""Each operator with small inputs, its definition, and what they give: for tests of what holds for all of them.

Run as a script, in a process that may lack Triton, it prints a report as JSON.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import dfn_kernels as ops
import torch
from dfn_kernels._triton import MISSING
from dfn_kernels.channel_attention import channel_attention_ref
from dfn_kernels.cross_entropy import upsample_cross_entropy_ref
from dfn_kernels.focal_loss import upsample_focal_loss_ref
from dfn_kernels.multiscale import multiscale_argmax_ref
from dfn_kernels.preprocess import resize_normalize_ref
from dfn_kernels.upsample_add import upsample_add_ref
from torch import Tensor


class Problem(NamedTuple):
    """An operator and its definition as functions of the same tensors; gradients are taken for ``differentiable``."""

    operator: Callable[..., Any]
    definition: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    differentiable: int  # so many of the inputs, from the first


def results(fn: Callable[..., Any], problem: Problem) -> list[Tensor]:
    """fn's outputs and, where there are gradients, those of a random function of the first output."""
    inputs = [x.clone().requires_grad_(i < problem.differentiable) for i, x in enumerate(problem.inputs)]
    out = fn(*inputs)
    out = list(out) if isinstance(out, tuple) else [out]
    if not problem.differentiable:
        return out
    d_out = torch.randn(out[0].shape, generator=torch.Generator().manual_seed(1), dtype=out[0].dtype)
    return [*(x.detach() for x in out), *torch.autograd.grad(out[0], inputs[: problem.differentiable], d_out)]


def problems() -> dict[str, Problem]:
    """By name; float64, so that equal means equal to many digits."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.uint8)

    def decide(fn: Callable[..., Any], *maps: Tensor) -> Any:
        return fn(list(maps), (4, 5), flipped=[False, True])

    normalised = {"size": (3, 7), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "flip": True, "dtype": torch.float64}
    low, high, parameters = random(2, 3, 4, 5), random(2, 3, 2, 3), (random(3, 6), random(3), random(3, 3), random(3))
    return {
        "channel_attention": Problem(ops.channel_attention, channel_attention_ref, (low, high, *parameters), 6),
        "upsample_add": Problem(ops.upsample_add, upsample_add_ref, (low, high), 2),
        "upsample_cross_entropy": Problem(
            ops.upsample_cross_entropy, upsample_cross_entropy_ref, (random(2, 3, 2, 3), integers(4, 2, 4, 5)), 1
        ),
        "upsample_focal_loss": Problem(
            ops.upsample_focal_loss, upsample_focal_loss_ref, (random(2, 1, 2, 3), integers(3, 2, 4, 5)), 1
        ),
        "multiscale_argmax": Problem(
            partial(decide, partial(ops.multiscale_argmax, return_scores=True)),
            partial(decide, multiscale_argmax_ref),
            (random(2, 3, 2, 3), random(2, 3, 3, 2)),
            0,
        ),
        "resize_normalize": Problem(
            partial(ops.resize_normalize, **normalised),
            partial(resize_normalize_ref, **normalised),
            (integers(256, 2, 4, 5, 3),),
            0,
        ),
    }


def differences(problem: Problem) -> list[float]:
    """The largest difference between operator and definition, of each output and gradient."""
    pairs = zip(results(problem.operator, problem), results(problem.definition, problem), strict=True)
    return [(ours.double() - expected.double()).abs().max().item() for ours, expected in pairs]


def report() -> dict[str, Any]:
    """Why Triton is missing, how far each operator is from its definition, and how each fails where it is forced."""
    import dfn_fast  # noqa: F401  that it can be imported is what is reported

    found: dict[str, Any] = {"missing": MISSING, "differences": {}, "forced": {}}
    for name, problem in problems().items():
        found["differences"][name] = differences(problem)
        os.environ["DFN_KERNELS"] = "triton"
        try:
            problem.operator(*problem.inputs)
        except RuntimeError as error:
            found["forced"][name] = str(error)
        del os.environ["DFN_KERNELS"]
    return found


if __name__ == "__main__":
    print(json.dumps(report()))
