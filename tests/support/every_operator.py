"""Each operator with small inputs, its definition, and the results of both, for tests that cover all operators.

As a script, in a process that may lack Triton, it prints a report as JSON.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dfn_kernels as ops
from dfn_kernels.attention.channel_attention import channel_attention_ref
from dfn_kernels.attention.upsample_add import upsample_add_ref
from dfn_kernels.common.triton_or_stub import MISSING
from dfn_kernels.convolution.conv3x3 import conv3x3_ref
from dfn_kernels.convolution.fused_conv import Packed, fused_conv, fused_conv_ref
from dfn_kernels.images.multiscale_argmax import multiscale_argmax_ref
from dfn_kernels.images.resize_normalize import resize_normalize_ref
from dfn_kernels.losses.cross_entropy import upsample_cross_entropy_ref
from dfn_kernels.losses.focal_loss import upsample_focal_loss_ref


class Problem(NamedTuple):
    """An operator and its definition as functions of the same tensors."""

    operator: Callable[..., Any]
    definition: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    differentiable: int  # how many inputs, from the first, get a gradient


class Sizes(NamedTuple):
    """Sizes shared by all problems: images, channels or classes, the full size and the small one."""

    B: int = 2
    K: int = 3
    H: int = 4
    W: int = 5
    h: int = 2
    w: int = 3


USUAL = Sizes()


def results(fn: Callable[..., Any], problem: Problem, d_out: Tensor | None = None) -> list[Tensor]:
    """fn's outputs, then the gradients of its differentiable inputs if it has any. ``d_out`` is the gradient of the
    first output, random by default. Inputs keep their memory layout."""
    inputs = [x.detach().requires_grad_(i < problem.differentiable) for i, x in enumerate(problem.inputs)]
    out = fn(*inputs)
    out = list(out) if isinstance(out, tuple) else [out]
    if not problem.differentiable:
        return out
    d_out = random_gradient(out[0]) if d_out is None else d_out
    return [*(x.detach() for x in out), *torch.autograd.grad(out[0], inputs[: problem.differentiable], d_out)]


def random_gradient(out: Tensor) -> Tensor:
    """A random gradient like ``out``: the same numbers, rounded, in every dtype and on every device."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)


def problems(sizes: Sizes = USUAL, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Problem]:
    """The operators with Triton kernels, by name. In float64, results can be compared to many digits."""
    generator = torch.Generator().manual_seed(0)
    B, K, H, W, h, w = sizes

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.uint8).to(device)

    def decide(fn: Callable[..., Any], *maps: Tensor) -> Any:
        return fn(list(maps), (H, W), flipped=[False, True])

    normalised = {"size": (h, w), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "flip": True, "dtype": dtype}
    low, high, parameters = (
        random(B, K, H, W),
        random(B, K, h, w),
        (random(K, 2 * K), random(K), random(K, K), random(K)),
    )
    targets = (B, H, W) if K == 1 else (B, K, H, W)
    return {
        "channel_attention": Problem(ops.channel_attention, channel_attention_ref, (low, high, *parameters), 6),
        "upsample_add": Problem(ops.upsample_add, upsample_add_ref, (low, high), 2),
        "upsample_cross_entropy": Problem(
            ops.upsample_cross_entropy, upsample_cross_entropy_ref, (random(B, K, h, w), integers(K + 1, B, H, W)), 1
        ),
        "upsample_focal_loss": Problem(
            ops.upsample_focal_loss, upsample_focal_loss_ref, (random(B, K, h, w), integers(3, *targets)), 1
        ),
        "multiscale_argmax": Problem(
            partial(decide, partial(ops.multiscale_argmax, return_scores=True)),
            partial(decide, multiscale_argmax_ref),
            (random(B, K, h, w), random(B, K, w, h)),
            0,
        ),
        "resize_normalize": Problem(
            partial(ops.resize_normalize, **normalised),
            partial(resize_normalize_ref, **normalised),
            (integers(256, B, H, W, 3),),
            0,
        ),
    }


def convolutions(sizes: Sizes = USUAL, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Problem]:
    """The convolution operators: PyTorch's own, cuDNN's, oneDNN's or Winograd's."""
    generator = torch.Generator().manual_seed(0)
    B, K, H, W, _, outputs = sizes

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def fuse(fn: Callable[..., Any], *operands: Tensor, **options: Any) -> Any:
        return fn(*operands, stride=1, padding=1, relu=True, **options)

    x, weight = random(B, K, H, W), random(outputs, K, 3, 3)
    operands = (x, weight, random(outputs), random(B, outputs, H, W))
    return {
        "conv3x3": Problem(ops.conv3x3, conv3x3_ref, (x, weight), 2),
        "fused_conv": Problem(
            lambda *operands: fuse(fused_conv, *operands, packed=Packed()), partial(fuse, fused_conv_ref), operands, 0
        ),
    }


def differences(problem: Problem) -> list[float]:
    """The largest difference between operator and definition, for each output and gradient."""
    pairs = zip(results(problem.operator, problem), results(problem.definition, problem), strict=True)
    return [(ours.double() - expected.double()).abs().max().item() for ours, expected in pairs]


def report() -> dict[str, Any]:
    """Why Triton is missing, how far each operator is from its definition, and how each fails if Triton is forced."""
    import dfn_fast  # noqa: F401  checks that it can be imported

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
