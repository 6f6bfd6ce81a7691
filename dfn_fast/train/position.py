"""How far a training run has got."""

import math
from dataclasses import dataclass, field

NO_LABEL = "has no labelled pixel: there is no mIoU, and the newest network counts as the best"


@dataclass
class Position:
    """How far a run has got: the part of a checkpoint that is not the trainer's state."""

    epoch: int = 0
    step: int = 0  # optimiser steps done in this epoch
    iteration: int = 0  # optimiser steps done in the run
    loss_sum: float = 0.0  # over this epoch's steps
    seconds: float = 0.0  # of training, without validation
    best_mean_iou: float = -1.0  # below 0: none was measured
    last_mean_iou: float = -1.0  # nan: the validation split has no labelled pixel
    per_class_iou: list[float] = field(default_factory=list)
    skipped_steps: int = 0  # in the run, because their gradients overflowed in fp16
    skipped_in_a_row: int = 0  # up to now

    @property
    def measured(self) -> bool:
        """Whether the last validation found a labelled pixel."""
        return not math.isnan(self.last_mean_iou)
