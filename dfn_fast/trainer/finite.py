"""Which losses, gradients and weights are finite."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from dfn_fast.errors import UserError


class NonFiniteLoss(UserError):
    """A loss, gradient or weight is nan or infinite. The text says which, since which iteration, and what to try."""


class Gradients(NamedTuple):
    """Which gradients of a step are finite."""

    names: list[str]  # parameters that have a gradient
    finite: Tensor  # [P] bool, on the device


def broken_names(names: Iterable[str], finite: Tensor) -> list[str]:
    return [name for name, good in zip(names, finite.tolist(), strict=True) if not good]
