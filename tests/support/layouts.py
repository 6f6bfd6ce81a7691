"""Memory layouts of inputs and of output gradients that an operator must read correctly."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LAYOUTS = ["contiguous", "channels_last", "sliced", "expanded"]


def as_layout(x: Tensor, layout: str) -> Tensor:
    """x in ``layout``, differentiably. "expanded" repeats the values of its first pixel for all pixels."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # every element has a neighbour that is not part of x
        return torch.stack([x, torch.full_like(x, 1e4)], dim=-1)[..., 0]
    return x[:, :, :1, :1].expand_as(x)


class _Gradient(torch.autograd.Function):
    """The identity, whose gradient arrives in another layout."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d_out):
        return as_layout(d_out, ctx.layout), None


def with_layouts(fn: Callable[..., Tensor], layouts: Sequence[str], d_out: str) -> Callable[..., Tensor]:
    """fn with its first inputs in ``layouts`` and its output's gradient in layout ``d_out``."""

    def wrapped(*inputs: Tensor) -> Tensor:
        features = [as_layout(x, layout) for x, layout in zip(inputs, layouts, strict=False)]
        return _Gradient.apply(fn(*features, *inputs[len(layouts) :]), d_out)

    return wrapped
