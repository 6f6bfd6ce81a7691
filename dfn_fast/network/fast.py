"""FastDFN: the network of :mod:`dfn_fast.network.reference`, with the same interface and made fast.

Parameters, their names, initialisation and checks are the reference's. Only the functions that run the blocks differ:
the operators of ``dfn_kernels`` and the exact savings of :mod:`dfn_fast.network.savings`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfn_fast.network.blocks import ChannelAttentionBlock, resize
from dfn_fast.network.fused import FusedDFN
from dfn_fast.network.losses import (
    CrossEntropyLoss,
    SigmoidFocalLoss,
    dfn_loss,
    focal_loss,
    require_no_label,
    with_verdict,
)
from dfn_fast.network.recompute import recomputed
from dfn_fast.network.reference import ReferenceDFN
from dfn_fast.network.savings import Savings, gate_parameters, head_scores, rrb
from dfn_fast.network.structure import unchanged
from dfn_fast.runtime.regions import region
from dfn_kernels import channel_attention, upsample_add, upsample_cross_entropy, upsample_focal_loss


class FastDFN(ReferenceDFN):
    """Discriminative Feature Network; a drop-in for the authors' ``DFN``. Arguments: :class:`ReferenceDFN`.

    With the default criteria (``None``) losses are computed from the small scores: training makes no scores of the
    image's size. A criterion that you give gets scores at the image's size, as in the authors' network.
    A block that was changed after it was built (see :mod:`dfn_fast.network.structure`) runs its own ``forward``.
    ``savings`` selects the optimisations. To measure one, assign ``model.savings = Savings(composed_head=False)``.
    """

    savings = Savings()
    memory = "off"  # what the backward pass recomputes, see :mod:`dfn_fast.network.recompute`

    def forward(
        self,
        data: Tensor,
        label: Tensor | None = None,
        aux_label: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> Tensor:
        """Normalised RGB ``[B, 3, H, W]`` -> log-probabilities ``[B, K, H, W]``; with both labels, the loss (eq. 7).

        ``label`` ``[B, H, W]`` holds class ids, ``aux_label`` ``[B, H, W]`` is 1 on borders and 0 elsewhere; 255 is
        ignored in both. H and W are at least 32. ``shares``: see :func:`dfn_fast.network.losses.dfn_loss`.

        With the default criterion a label that is neither a class nor 255 is a ``ValueError`` on a CPU; on a GPU and in
        a compiled graph it makes the loss nan, so that nothing waits for the device. ``ValueError`` too for labels of
        another size than the images, for one label map without the other, and for more than 255 classes.
        """
        wrong = None
        if label is None or aux_label is None:
            require_no_label(label, aux_label)
        else:
            wrong = self.check_labels(data, label, aux_label)
        with region("backbone"):
            stages = self.stages(data)
        if label is None or aux_label is None:
            last_only = self.savings.one_head and not self.training
            score = self.smooth_scores(stages, data.shape[2:], last_only)[-1]
            return F.log_softmax(resize(score, data.shape[2:]), dim=1)
        smooth = self.smooth_scores(stages, data.shape[2:])
        border = self.border_scores(stages, data.shape[2:]) if self.has_border else []
        with region("losses"):
            loss = dfn_loss(smooth, border, label, aux_label, self.smooth_loss, self.border_loss, self.alpha, shares)
            return with_verdict(loss, wrong)

    def fuse(self, *, return_border: bool = False, dtype: torch.dtype | None = None, plain: bool = False) -> FusedDFN:
        """The inference network for the current weights; arguments: :class:`FusedDFN`."""
        return FusedDFN(self, return_border=return_border, dtype=dtype, plain=plain)

    def smooth_loss(self, score: Tensor, label: Tensor) -> Tensor:
        """``criterion`` of a small score ``[B, K, h, w]``, resized to the size of the labels (eq. 5)."""
        criterion = self.criterion
        if self.savings.fused_losses and type(criterion) is CrossEntropyLoss:
            return upsample_cross_entropy(score, label, ignore_index=criterion.ignore_index)
        return criterion(resize(score, label.shape[-2:]), label)

    def border_loss(self, score: Tensor, target: Tensor) -> Tensor:
        """``aux_criterion`` of a small score ``[B, 1, h, w]``, resized to the size of the targets (eq. 4 and 6)."""
        criterion = self.aux_criterion
        if self.savings.fused_losses and type(criterion) is SigmoidFocalLoss and criterion.formula is focal_loss:
            settings = {name: getattr(criterion, name) for name in ("alpha", "gamma", "ignore_index")}
            return upsample_focal_loss(score, target, **settings)
        return criterion(resize(score, target.shape[-2:]), target)

    def smooth_network(self, stages: list[Tensor], size: torch.Size) -> list[Tensor]:
        return [resize(score, size) for score in self.smooth_scores(stages, size)]

    def border_network(self, stages: list[Tensor], size: torch.Size) -> list[Tensor]:
        return [resize(score, size) for score in self.border_scores(stages, size)]

    def smooth_scores(self, stages: list[Tensor], size: torch.Size, last_only: bool = False) -> list[Tensor]:
        """Section 3.1, from the highest stage to the lowest: scores ``[B, K, h, w]`` at the size of each stage.

        A head that was changed gives scores of ``size``, the image's. ``last_only`` leaves out all but the last.
        """
        scores = []
        with region("smooth global context"):
            high = self.first_high(stages[-1])
        for i, stage in enumerate(reversed(stages)):
            with region(f"smooth stage 1/{32 >> i}"):
                low = self.refine(self.smooth_pre_rrbs[i], stage)
                low = self.attend(i, low, high)
                high = self.refine(self.smooth_aft_rrbs[i], low)
            head = self.smooth_heads[i]
            if not isinstance(head, nn.Identity) and (i == 3 or not last_only):
                with region(f"smooth head 1/{32 >> i}"):
                    scores.append(self.score(head, high, size))
        return scores

    def refine(self, block: nn.Module, x: Tensor, padded: bool = False) -> Tensor:
        """An RRB; ``padded``: its channels may be padded with zeros."""
        if not unchanged(block):
            return block(x)
        return recomputed(self.memory, rrb, block, x, self.savings, padded=padded)

    def score(self, head: nn.Module, x: Tensor, size: torch.Size) -> Tensor:
        """A head's scores at the size of x; at ``size`` if the head was changed."""
        if not unchanged(head):
            return head(x, size)
        return recomputed(self.memory, head_scores, head, x, self.savings)

    def attend(self, i: int, low: Tensor, high: Tensor) -> Tensor:
        """Channel attention block ``i``, eq. 3: ``high``, at its own size, chooses channels of ``low``."""
        if not len(self.cabs):
            return self.add(low, high)
        cab: ChannelAttentionBlock = self.cabs[i]  # type: ignore[assignment]
        if not self.savings.channel_attention or not unchanged(cab):
            return cab(low, resize(high, low.shape[2:]))
        return channel_attention(low, high.to(low.dtype), *gate_parameters(cab.channel_attention))

    def add(self, low: Tensor, high: Tensor) -> Tensor:
        """``low + resize(high)``."""
        if not self.savings.upsample_add:
            return low + resize(high, low.shape[2:])
        return upsample_add(low, high.to(low.dtype))

    def border_scores(self, stages: list[Tensor], size: torch.Size) -> list[Tensor]:
        """Section 3.2, from the lowest stage to the highest: scores ``[B, 1, h, w]``, all at the lowest one's size.

        A head that was changed gives scores of ``size``, the image's.
        """
        scores = []
        acc = None
        used = [*self.border_pre_rrbs, *list(self.border_aft_rrbs)[1:], *self.border_heads]
        padded = all(unchanged(block) or type(block) is nn.Identity for block in used)  # a changed one takes no padding
        for i, stage in enumerate(stages):
            with region(f"border stage 1/{4 << i}"):
                x = self.refine(self.border_pre_rrbs[i], stage, padded)
                if acc is not None:
                    x = self.add(acc, x)
                    x = self.refine(self.border_aft_rrbs[i], x, padded)
                acc = x
            if not isinstance(self.border_heads[i], nn.Identity):
                with region(f"border head {i + 1}"):
                    scores.append(self.score(self.border_heads[i], acc, size))
        return scores
