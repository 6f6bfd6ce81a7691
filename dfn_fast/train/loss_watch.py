"""Finds losses and gradients that are not finite, without waiting for the device at each step."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dfn_fast.errors import listed
from dfn_fast.runtime.processes import ALONE
from dfn_fast.train.position import Position
from dfn_fast.trainer.finite import Gradients, NonFiniteLoss, broken_names
from dfn_fast.trainer.trainer import Trainer

MAX_SKIPPED = 20  # fp16 steps in a row: each halves the loss scale, from 65536 down to 1/16


class Pending(NamedTuple):
    iteration: int  # from 0
    loss: Tensor  # scalar, on the device
    names: list[str]  # of the images
    gradients: Gradients | None


class LossWatch:
    """Keeps losses on the device until they are read, each with the names of its images and its gradients.

    Reading waits for the device, so on a GPU it happens every few iterations; only then are nan and infinity found.
    In fp16 the scaler has skipped a step whose gradients overflowed, and ``position`` counts it. A loss that is not
    finite is an error in every precision, as its cause stays in the statistics of the norm layers for good.
    """

    def __init__(self, trainer: Trainer | None = None, position: Position | None = None):
        self.trainer, self.position = trainer, position or Position()
        self.world = trainer.world if trainer else ALONE
        self.pending: list[Pending] = []

    def add(self, iteration: int, loss: Tensor, names: list[str]) -> None:
        """Adds the loss and the images of the last step."""
        self.pending.append(Pending(iteration, loss, names, self.trainer.gradients if self.trainer else None))

    def read(self) -> list[float]:
        """Returns the losses since the last call, each over the batch of all processes.

        Raises :class:`NonFiniteLoss`, in all processes, with iteration, images and parameters.
        """
        if not self.pending:
            return []
        values = self.world.mean(torch.stack([self._verdict(step) for step in self.pending])).tolist()
        for (loss, finite), step in zip(values, self.pending, strict=True):
            if not np.isfinite(loss):
                raise NonFiniteLoss(
                    f"the loss is {loss} at iteration {step.iteration + 1}; the images were {self._images(step)}. "
                    f"Look at these images and labels; {self._advice()}"
                )
            self._judge_gradients(step, loss, finite == 1)
        self.pending.clear()
        return [loss for loss, _ in values]

    @staticmethod
    def _verdict(step: Pending) -> Tensor:
        """``[2]``: the loss, and 1 if all gradients are finite, else 0."""
        finite = torch.ones_like(step.loss) if step.gradients is None else step.gradients.finite.all()
        return torch.stack((step.loss, finite.to(step.loss.dtype)))

    def _judge_gradients(self, step: Pending, loss: float, finite: bool) -> None:
        position = self.position
        if finite:
            position.skipped_in_a_row = 0
            return
        if self.trainer is None or not self.trainer.scaler.is_enabled():
            raise NonFiniteLoss(
                f"the loss is {loss:.4g} but gradients are not finite at iteration {step.iteration + 1}; "
                f"the images were {self._images(step)}, the parameters {self._parameters(step)}. "
                "Look at these images and labels; "
                f"{self._advice()}"
            )
        position.skipped_steps += 1
        position.skipped_in_a_row += 1
        if position.skipped_in_a_row >= MAX_SKIPPED:
            first = step.iteration + 2 - position.skipped_in_a_row
            raise NonFiniteLoss(
                f"the {position.skipped_in_a_row} steps since iteration {first} were all skipped: "
                f"the loss is {loss:.4g} but gradients overflowed, at iteration {step.iteration + 1} those of "
                f"{self._parameters(step)}. The weights are as they were before these steps; {self._advice()}"
            )

    def _images(self, step: Pending) -> str:
        return ", ".join(self.world.gather(step.names))

    def _parameters(self, step: Pending) -> str:
        assert step.gradients is not None
        broken = list(dict.fromkeys(self.world.gather(broken_names(*step.gradients))))
        return f"{listed(broken)} ({len(broken)} of {len(step.gradients.names)})"

    def _advice(self) -> str:
        return self.trainer.advice() if self.trainer else "lower --lr, or use --amp off or bf16"
