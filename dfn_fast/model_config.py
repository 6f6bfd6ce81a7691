"""The network that a file describes: its ``model_config`` is checked before memory is spent on it.

A checkpoint may come from anywhere. Whatever it asks for, nothing is fetched or read from elsewhere for it, and no
network is built that is much larger than the weights in the file.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dfn_fast.backbone import LAYERS, STEMS
from dfn_fast.cli import nearest
from dfn_fast.errors import CheckpointError, brief
from dfn_fast.reference import ReferenceDFN

LARGEST = 1 << 30  # of whole numbers
SLACK = 1 << 26  # bytes of a network beyond four times those of its file, whose numbers may be of half precision
_KINDS: dict[str, type | tuple[type, ...]] = {
    "num_classes": int,
    "alpha": (int, float),
    "backbone": str,
    "stem": str,
    "channels": int,
    "border_channels": int,
    **dict.fromkeys(("global_context", "channel_attention", "deep_supervision", "border"), bool),
}
_CHOICES = {"backbone": tuple(LAYERS), "stem": STEMS}

Network = TypeVar("Network", bound=ReferenceDFN)


def checked_config(config: Any, state: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """``config`` as a dictionary of the network's arguments that a file may set, of the right types.

    Raises :class:`CheckpointError` for anything else, an argument such as ``pretrained_model`` included, and for a
    network that takes far more memory than the file's ``state``.
    """
    if not isinstance(config, Mapping) or "num_classes" not in config:
        raise CheckpointError(f"{where}: its model_config has no 'num_classes'; copy or save it again")
    for name, value in config.items():
        reason = _wrong(name, value)
        if reason:
            raise CheckpointError(f"{where}: its model_config builds no network ({reason}); copy or save it again")
    count = _parameters(dict(config), where)
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in state.values())}
    if 4 * count > 4 * sum(storages.values()) + SLACK:
        raise CheckpointError(
            f"{where}: its model_config asks for a network of {count} parameters, but its weights have "
            f"{sum(storages.values())} bytes; copy or save it again"
        )
    return dict(config)


def _wrong(name: Any, value: Any) -> str | None:
    """What is wrong about an argument, if anything."""
    if not isinstance(name, str) or name not in _KINDS:
        return f"unknown argument {brief(name)}{nearest(brief(name), _KINDS)}"
    kind = _KINDS[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return f"{name} is {brief(value)}"
    if isinstance(value, int) and kind is int and not 1 <= value <= LARGEST:
        return f"{name} is {brief(value)}"
    if name in _CHOICES and value not in _CHOICES[name]:
        return f"{name} is {brief(value)}, none of {', '.join(_CHOICES[name])}"
    return None


class _ShapesAlone(TorchFunctionMode):
    """On the meta device: normal_ would first import a compiler, for seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is torch.Tensor.normal_ else func(*args, **(kwargs or {}))


def _parameters(config: dict[str, Any], where: str) -> int:
    try:
        with torch.device("meta"), _ShapesAlone():
            network = ReferenceDFN(**config)
    except RuntimeError as error:  # a tensor of more than 2^63 bytes
        raise CheckpointError(
            f"{where}: its model_config builds no network ({error}); copy or save it again"
        ) from error
    return sum(parameter.numel() for parameter in network.parameters())


def build(network: type[Network], config: Mapping[str, Any]) -> Network:
    """The network, without a trace in the caller's random numbers: its initial weights are not kept."""
    with torch.random.fork_rng(devices=[]):
        return network(**config)
