"""Which losses, gradients and weights are finite."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from dfn_fast.errors import UserError


class NonFiniteLoss(UserError):
    """A loss, gradient or weight is nan or infinite; the text says which, since which iteration, and what to try."""


class Gradients(NamedTuple):
    """What is kept of a step's gradients."""

    names: list[str]  # of the parameters that have one
    finite: Tensor  # [P] bool, on the device


def broken_names(names: Iterable[str], finite: Tensor) -> list[str]:
    return [name for name, good in zip(names, finite.tolist(), strict=True) if not good]
