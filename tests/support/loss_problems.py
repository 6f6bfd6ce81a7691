"""Helpers for the tests of both losses: a call's loss and gradient, and the layouts that its operands may have."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from support.layouts import with_layouts
from support.parity import random_like

LAYOUTS = ["contiguous", "channels_last", "padded", "sliced", "expanded"]


def gradient(fn: Callable[..., Tensor], logits: Tensor, labels: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """The loss and the logits' gradient, for a random output gradient of the loss's shape."""
    logits = logits.detach().requires_grad_()
    loss = fn(logits, labels, **settings)
    (d_logits,) = torch.autograd.grad(loss, logits, random_like(loss))
    return loss.detach(), d_logits


def logits_in_layout(x: Tensor, layout: str) -> Tensor:
    """x ``[B, C, h, w]`` in ``layout``, differentiably. "expanded" repeats its first image."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "padded":  # the first of more channels, as from a padded head: read in place
        return torch.cat([x, torch.full_like(x, 1e4)], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]]
    if layout == "sliced":  # every column has a neighbour that is not part of x
        return torch.stack([x, torch.full_like(x, 1e4)], dim=-1)[..., 0]
    return x[:1].contiguous(memory_format=torch.channels_last).expand_as(x)


def labels_in_layout(labels: Tensor, layout: str) -> Tensor:
    """labels ``[..., H, W]`` in ``layout``. "expanded" repeats the first column; the others change no value."""
    if layout in ("channels_last", "padded"):  # transposed: neighbours in a column are adjacent in memory
        return labels.mT.contiguous().mT
    if layout == "sliced":
        return torch.stack([labels, torch.full_like(labels, 1)], dim=-1)[..., 0]
    return labels[..., :1].expand_as(labels) if layout == "expanded" else labels.contiguous()


def in_layouts(fn: Callable[..., Tensor], logits: str, labels: str, d_loss: str | None) -> Callable[..., Tensor]:
    """fn with logits and labels in the given layouts. ``d_loss`` is the layout of the gradient of a loss for each pixel
    (one of ``layouts.LAYOUTS``), or None if the loss is one number."""

    def wrapped(x: Tensor, y: Tensor) -> Tensor:
        loss = fn(logits_in_layout(x, logits), labels_in_layout(y, labels))
        return loss if d_loss is None else loss.reshape(len(x), -1, *y.shape[-2:])

    return wrapped if d_loss is None else with_layouts(wrapped, (), d_loss)
