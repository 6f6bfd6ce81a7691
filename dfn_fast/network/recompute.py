"""Less activation memory for more arithmetic: parts of the forward pass run again in the backward pass.

``"norm"`` keeps the outputs of convolutions and recomputes normalisation, ReLU and additions between them.
``"blocks"`` keeps the outputs of residual blocks and recomputes everything inside them. Results are the same.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

GROUP = 4  # blocks that "norm" recomputes as one, so that only every fourth block's output is kept
Contexts = tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]


def set_recompute(model: nn.Module, mode: str) -> None:
    """Makes ``model``, a FastDFN, recompute by ``mode``: in its backbone, and with "blocks" in every RRB too."""
    model.backbone.memory = mode  # type: ignore[assignment, union-attr]
    model.memory = mode if mode == "blocks" else "off"  # type: ignore[assignment]


def run_blocks(stage: nn.Sequential, x: Tensor, mode: str) -> Tensor:
    """Runs the blocks of a backbone's stage, one after the other."""
    if mode == "off":
        return stage(x)
    blocks, size = list(stage), GROUP if mode == "norm" else 1
    for i in range(0, len(blocks), size):
        x = recomputed(mode, chain, blocks[i : i + size], x)
    return x


def chain(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def recomputed(mode: str, fn: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """``fn(*args, **settings)``; the backward pass recomputes everything that ``mode`` does not keep.

    Running statistics of the modules among ``args`` are updated once. ``fn`` must not draw random numbers.
    """
    if mode == "off" or not torch.is_grad_enabled():
        return fn(*args, **settings)
    context: Callable[[], Contexts] = _convolutions_kept if mode == "norm" else noop_context_fn
    if not torch.compiler.is_compiling():
        context = partial(_statistics_kept, context, [m for arg in args for m in _modules_in(arg)])
    elif mode == "blocks":  # a compiled graph updates the statistics once anyway, and takes no other contexts
        return checkpoint(partial(fn, **settings), *args, use_reentrant=False, preserve_rng_state=False)
    return checkpoint(partial(fn, **settings), *args, use_reentrant=False, preserve_rng_state=False, context_fn=context)


def _modules_in(argument: Any) -> Iterator[nn.Module]:
    """Every module in an argument of a block's function: a module, or several."""
    if isinstance(argument, nn.Module):
        yield from argument.modules()
    elif isinstance(argument, list | tuple | nn.Sequential):
        for item in argument:
            yield from _modules_in(item)


def _convolutions_kept() -> Contexts:
    return create_selective_checkpoint_contexts(policy)


def policy(context: Any, operator: Any, *args: Any, **settings: Any) -> CheckpointPolicy:
    """Keeps convolutions and our own operators, which cost as much."""
    costly = operator is torch.ops.aten.convolution.default or operator.namespace == "dfn_kernels"
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


def _statistics_kept(context: Callable[[], Contexts], modules: Sequence[nn.Module]) -> Contexts:
    """The contexts of the forward pass and of its recomputation, the latter on copies of all buffers."""
    forward, again = context()
    return forward, _on_copies(modules, again)


@contextlib.contextmanager
def _on_copies(modules: Sequence[nn.Module], inner: contextlib.AbstractContextManager) -> Iterator[None]:
    """Replaces the buffers of ``modules`` with copies inside: norm layers may update them, but no update stays."""
    own = [(module, dict(module._buffers)) for module in modules if module._buffers]
    try:
        for module, buffers in own:
            module._buffers.update({name: b.clone() for name, b in buffers.items() if b is not None})
        with inner:
            yield
    finally:
        for module, buffers in own:
            module._buffers.update(buffers)
