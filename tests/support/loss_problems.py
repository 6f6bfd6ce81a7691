"""What the tests of both losses share: a call's loss and gradient, and the layouts in which its operands may come."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from support.layouts import with_layouts
from support.parity import random_like

LAYOUTS = ["contiguous", "channels_last", "padded", "sliced", "expanded"]


def gradient(fn: Callable[..., Tensor], logits: Tensor, labels: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """The loss, and the logits' gradient under a random factor, or a random one for each pixel."""
    logits = logits.detach().requires_grad_()
    loss = fn(logits, labels, **settings)
    (d_logits,) = torch.autograd.grad(loss, logits, random_like(loss))
    return loss.detach(), d_logits


def logits_in_layout(x: Tensor, layout: str) -> Tensor:
    """x ``[B, C, h, w]``, differentiably, in ``layout``; "expanded" takes its first image for all."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "padded":  # the first channels of more, as a padded head gives them: read in place
        return torch.cat([x, torch.full_like(x, 1e4)], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]]
    if layout == "sliced":  # every column has a neighbour that is no part of x
        return torch.stack([x, torch.full_like(x, 1e4)], dim=-1)[..., 0]
    return x[:1].contiguous(memory_format=torch.channels_last).expand_as(x)


def labels_in_layout(labels: Tensor, layout: str) -> Tensor:
    """labels ``[..., H, W]`` in ``layout``; "expanded" takes their first column for all, others change no value."""
    if layout in ("channels_last", "padded"):  # transposed: pixels that are neighbours in a column lie side by side
        return labels.mT.contiguous().mT
    if layout == "sliced":
        return torch.stack([labels, torch.full_like(labels, 1)], dim=-1)[..., 0]
    return labels[..., :1].expand_as(labels) if layout == "expanded" else labels.contiguous()


def in_layouts(fn: Callable[..., Tensor], logits: str, labels: str, d_loss: str | None) -> Callable[..., Tensor]:
    """fn of logits and labels, given both in a layout, and a loss of each pixel's gradient in ``d_loss`` (one of
    ``layouts.LAYOUTS``, or None for a loss that is one number)."""

    def wrapped(x: Tensor, y: Tensor) -> Tensor:
        loss = fn(logits_in_layout(x, logits), labels_in_layout(y, labels))
        return loss if d_loss is None else loss.reshape(len(x), -1, *y.shape[-2:])

    return wrapped if d_loss is None else with_layouts(wrapped, (), d_loss)
