"""State dicts, fitted to a model by name and shape."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from dfn_fast.checkpoint.archive import read_file, save_atomic, write_whole
from dfn_fast.errors import CheckpointError, brief, listed
from dfn_fast.runtime.random_state import WithoutRandomNumbers

STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict", "model_ema", "state_dict_ema", "ema")
# Names that every DFN, or every backbone, has: what stands before them is a prefix.
LANDMARKS = ("backbone.layer1.0.conv1.weight", "layer1.0.conv1.weight")
TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".tar")
MAX_NESTING = 10  # levels at which a state dict may lie in a checkpoint
DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8}
DTYPES |= {torch.int8, torch.int16, torch.int32, torch.int64}
Network = TypeVar("Network", bound=nn.Module)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Writes the model's state dict, in the published names and shapes; the suffix selects the format."""
    path = Path(path)
    # safetensors refuses channels_last tensors.
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict_of(model.state_dict()).items()}
    if path.suffix == ".safetensors":
        write_whole(path, lambda file: file.write(safetensors.torch.save(state)))
    elif path.suffix in TORCH_SUFFIXES:
        save_atomic(state, path)
    else:
        raise CheckpointError(f"{path}: expected one of the suffixes .safetensors {' '.join(TORCH_SUFFIXES)}")


def state_dict_of(content: Mapping[str, Any], where: str = "the checkpoint") -> dict[str, Tensor]:
    """The state dict in a checkpoint's content, bare or under one of ``STATE_DICT_KEYS``, with plain names: without
    the ``module.`` of (Distributed)DataParallel, the ``_orig_mod.`` of ``torch.compile`` and the attribute that a
    training framework keeps the network in (``model.``, ``net.``), however they are nested.
    """
    for _ in range(MAX_NESTING):
        below = next((content[key] for key in STATE_DICT_KEYS if isinstance(content.get(key), Mapping)), None)
        if below is None:
            break
        content = below
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        found = listed(name if isinstance(name, str) else brief(name) for name in content)
        raise CheckpointError(
            f"{where}: expected a state dict, bare or under {', '.join(map(repr, STATE_DICT_KEYS))}, got "
            f"{found or 'nothing'}"
        )
    lying = [name for name, tensor in tensors.items() if not _is_plain_tensor(tensor)]
    if lying:
        raise CheckpointError(
            f"{where}: {len(lying)} tensors are not stored as one real number for each element: "
            f"{listed(lying)}; save dense tensors of real numbers"
        )
    state = {_plain_name(name): tensor for name, tensor in tensors.items()}
    if len(state) < len(tensors):
        raise CheckpointError(f"{where}: holds the same weights twice, with and without a wrapper's prefix")
    return _without_prefix(state)


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without the prefix that stands before the names of a network of ours; other names stay.

    The counter of ``torch.optim.swa_utils.AveragedModel`` beside the network is left out.
    """
    known = next((name for name in state if name.endswith(LANDMARKS)), "")
    prefix = known.removesuffix(next((mark for mark in LANDMARKS if known.endswith(mark)), known))
    if not known or (prefix and not prefix.endswith(".")):
        return state
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name != "n_averaged"}
    return found if len(found) >= len(state) - ("n_averaged" in state) else state


def _is_plain_tensor(tensor: Tensor) -> bool:
    """Whether each element has a number of its own in memory; a stride of 0 makes gigabytes of one number."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta or tensor.dtype not in DTYPES:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _plain_name(name: str) -> str:
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while parts[0] == "module" and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


@dataclass(frozen=True)
class Mismatch:
    """How a state dict differs from a model's; false if it does not. ``str()`` names the first few of each kind."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()  # name, the model's, the file's

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        shapes = [f"{name} (model {list(ours)}, file {list(theirs)})" for name, ours, theirs in self.wrong_shape]
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "wrong shape": shapes}
        return "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names)


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    *,
    strict: bool = True,
    where: str | None = None,
    remedy: str = "load the tensors that fit with strict=False",
) -> Mismatch:
    """Loads a checkpoint, given as a file or its content, into ``model`` and returns the mismatch.

    ``strict=False`` loads the tensors that fit by name and shape. ``num_batches_tracked`` may be missing, as in
    checkpoints of PyTorch 0.4. In errors ``where`` names the source, ``remedy`` another way to load it. Raises
    :class:`CheckpointError`, with the model unchanged, if ``strict`` is set and something does not fit, if nothing
    fits, or if weights are nan or infinite.
    """
    if isinstance(source, Mapping):
        where = where or "the given weights"
    else:
        where, source = where or str(source), read_file(source)
    state = state_dict_of(source, where)
    own = {_plain_name(name): (name, tensor) for name, tensor in model.state_dict().items()}
    fitting = {n: t for n, t in state.items() if n in own and t.shape == own[n][1].shape}
    mismatch = Mismatch(
        missing=tuple(n for n in own if n not in state and not n.endswith("num_batches_tracked")),
        unexpected=tuple(n for n in state if n not in own),
        wrong_shape=tuple(
            (n, tuple(own[n][1].shape), tuple(t.shape)) for n, t in state.items() if n in own and n not in fitting
        ),
    )
    if not fitting or (strict and mismatch):
        more = f", or {remedy}" if fitting and remedy else ""
        raise CheckpointError(f"{where} does not fit the model: {mismatch}. Build the model as it was saved{more}")
    # As the model will hold them: a number may be too large for its dtype.
    broken = [n for n, t in fitting.items() if not is_finite(t.to(own[n][1].dtype))]
    if broken:
        raise CheckpointError(
            f"{where}: {len(broken)} tensors hold nan or infinity: {listed(broken)}. "
            "Use a checkpoint from before the training diverged"
        )
    model.load_state_dict({own[n][0]: t for n, t in fitting.items()}, strict=False)
    return mismatch


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is nan or infinite, in one pass without a tensor of answers."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())  # nan is both the least and the largest


def ready(model: nn.Module, device: str | torch.device, channels_last: bool) -> None:
    """Prepares ``model`` for inference, in place: on ``device``, in eval mode and, if asked, in channels_last."""
    model.to(device).eval()
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def build(network: type[Network], config: Mapping[str, Any], *, random: bool = True) -> Network:
    """Builds the network without advancing the caller's random generator: its initial weights are not kept.

    ``random=False`` leaves out the random numbers, which take most of the time, if every weight is loaded afterwards.
    """
    with torch.random.fork_rng(devices=[]), contextlib.nullcontext() if random else WithoutRandomNumbers():
        return network(**config)
