"""The network as a Predictor runs it: fused, in its precision, compiled if asked, and within the available memory."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dfn_fast.errors import UserError
from dfn_fast.network.fused import FusedDFN
from dfn_fast.network.reference import ReferenceDFN
from dfn_fast.runtime.device import HALVES, inductor_options, out_of_memory
from dfn_fast.runtime.forks import first_call

AMP_DTYPES = {"off": None, **HALVES}
AMPS = ("auto", *AMP_DTYPES)
MOST_AT_ONCE = 32  # images or tiles of one batch


class Engine:
    """Normalised images in, stride-4 scores out.

    Networks are built at the first call that needs them and kept until :meth:`use` or :meth:`refresh`.

    Args:
        model: a ReferenceDFN, FastDFN or FusedDFN.
        amp: ``"off"``, ``"bf16"`` or ``"fp16"``; ``"auto"`` counts as ``"off"`` until :meth:`use` resolves it.
        compile: runs the network through torch.compile.
        batch: tiles in one run of the network; None: 1 on a CPU, on CUDA as many as free memory allows.
    """

    def __init__(self, model: ReferenceDFN | FusedDFN, amp: str, compile: bool, batch: int | None):  # noqa: A002
        self.model, self.amp, self.compile, self.batch = model, amp, compile, batch
        self.refresh()

    def refresh(self) -> None:
        """Takes the model's weights as they are now."""
        self._network: FusedDFN | None = None
        self._border_network: FusedDFN | None = None
        self._compiled: Any = None
        self._tile_bytes: dict[tuple[int, ...], int] = {}

    def use(self, amp: str) -> None:
        """Changes the precision; networks are built again."""
        self.amp = amp
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_compiled": None}  # compiled again when needed: code cannot be copied

    @property
    def device(self) -> torch.device:
        return self.model.device if isinstance(self.model, FusedDFN) else next(self.model.parameters()).device

    @property
    def network(self) -> FusedDFN:
        """The fused network for segmentation."""
        with first_call():
            if self._network is None:
                self._network = self._fused()
            return self._network

    @property
    def border_network(self) -> FusedDFN:
        """The fused network with its Border Network."""
        with first_call():
            if self._border_network is None:
                self._border_network = self._fused(return_border=True)
            return self._border_network

    def _fused(self, *, return_border: bool = False) -> FusedDFN:
        if isinstance(self.model, FusedDFN):
            return self.model
        dtype = None if self.amp == "auto" else AMP_DTYPES[self.amp]
        return FusedDFN(self.model, return_border=return_border, dtype=dtype, plain=self.compile)

    def scores(self, x: Tensor) -> Tensor:
        """``[B, 3, h, w]`` -> ``[B, K, h / 4, w / 4]``; half as many images at a time if memory runs out."""
        network = self.network
        if self.compile and self._compiled is None:
            options = inductor_options(freezing=x.device.type == "cpu")
            self._compiled = torch.compile(network.scores, options=options)
        try:
            return self._compiled(x) if self.compile else network.scores(x)
        except RuntimeError as error:
            if len(x) == 1 or not out_of_memory(error) or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
                raise
        return torch.cat([self.scores(half) for half in x.chunk(2)])

    def border_scores(self, x: Tensor) -> Tensor:
        """``[B, 3, h, w]`` -> ``[B, 1, h / 4, w / 4]``, before the sigmoid."""
        network = self.border_network
        return network.border_scores(network.stages(x), x.shape[2:])

    def tiles_at_once(self, x: Tensor, window: tuple[int, int], flip: bool) -> int:
        """How many tiles of ``x`` one run takes: ``batch``, or what free memory allows after a run with one tile.

        With ``flip`` each tile brings its mirror image.
        """
        if self.batch is not None or x.device.type != "cuda":
            return self.batch or 1
        if window not in self._tile_bytes:
            torch.cuda.reset_peak_memory_stats(x.device)
            before = torch.cuda.memory_allocated(x.device)
            self.scores(x[:, :, : window[0], : window[1]])
            self._tile_bytes[window] = max(torch.cuda.max_memory_allocated(x.device) - before, 1)
        kept = torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
        free = torch.cuda.mem_get_info(x.device)[0] + kept
        each = self._tile_bytes[window] * (2 if flip else 1)
        return min(max(int(0.7 * free / each), 1), MOST_AT_ONCE)


@contextlib.contextmanager
def memory_advice(size: Sequence[int]) -> Iterator[None]:
    """Turns an out-of-memory error for an image of ``size`` (height, width) into one that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"an image of {size[1]}x{size[0]} does not fit into memory; use --window 512, smaller "
            "--scales or --amp bf16"
        ) from error
