"""The network that a file describes: its ``model_config`` is checked before memory is spent on it.

A checkpoint may come from anywhere. Whatever it says, nothing is downloaded or read from elsewhere, and no network is
built that is much larger than the weights in the file.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfn_fast.errors import CheckpointError, brief, nearest
from dfn_fast.network.backbone import LAYERS, STEMS, BasicBlock, Bottleneck
from dfn_fast.runtime.random_state import WithoutRandomNumbers

LARGEST = 1 << 30  # the largest integer that an argument may be
SLACK = 1 << 26  # bytes that a network may have beyond four times its file's, which may be in half precision
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


def checked_arguments(
    network: Callable[..., nn.Module], config: Any, state: Mapping[str, Tensor], where: str
) -> dict[str, Any]:
    """``config`` as a dictionary of ``network``'s arguments that a file may set, of the right types.

    Raises :class:`CheckpointError` for anything else, including an argument such as ``pretrained_model``, and for a
    network that takes far more memory than the file's ``state``.
    """
    if not isinstance(config, Mapping) or "num_classes" not in config:
        raise CheckpointError(f"{where}: its model_config has no 'num_classes'; copy or save it again")
    for name, value in config.items():
        reason = _wrong(name, value)
        if reason:
            raise CheckpointError(
                f"{where}: its model_config does not build a network ({reason}); copy or save it again"
            )
    count = _parameters(network, dict(config), where)
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in state.values())}
    if 4 * count > 4 * sum(storages.values()) + SLACK:
        raise CheckpointError(
            f"{where}: its model_config asks for a network of {count} parameters, but its weights have "
            f"{sum(storages.values())} bytes; copy or save it again"
        )
    return dict(config)


def _wrong(name: Any, value: Any) -> str | None:
    """What is wrong with an argument, or None."""
    if not isinstance(name, str) or name not in _KINDS:
        return f"unknown argument {brief(name)}{nearest(brief(name), _KINDS)}"
    kind = _KINDS[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return f"{name} is {brief(value)}"
    if isinstance(value, int) and kind is int and not 1 <= value <= LARGEST:
        return f"{name} is {brief(value)}"
    if name in _CHOICES and value not in _CHOICES[name]:
        return f"{name} is {brief(value)}, expected one of {', '.join(_CHOICES[name])}"
    return None


def _parameters(network: Callable[..., nn.Module], config: dict[str, Any], where: str) -> int:
    """How many parameters the network would have. It is built without memory for them."""
    try:
        with torch.device("meta"), WithoutRandomNumbers():  # they would first spend seconds on importing a compiler
            built = network(**config)
    except RuntimeError as error:  # a tensor of more than 2^63 bytes
        raise CheckpointError(
            f"{where}: its model_config does not build a network ({error}); copy or save it again"
        ) from error
    return sum(parameter.numel() for parameter in built.parameters())


def infer_arguments(state: Mapping[str, Tensor], where: str = "the checkpoint") -> dict[str, Any]:
    """The keyword arguments of the network that ``state`` belongs to, inferred from its names and shapes.

    Raises :class:`CheckpointError` if a name that this needs is missing, or if the backbone is not a known ResNet.
    """

    def out_channels(name: str) -> int:
        if name not in state:
            raise CheckpointError(f"{where}: expected the weights of a DFN, but there is no {name}")
        if state[name].ndim != 4:
            raise CheckpointError(f"{where}: expected the weights of a DFN, but {name} is not a convolution")
        return state[name].shape[0]

    if "layer1.0.conv1.weight" in state:
        raise CheckpointError(f"{where}: these are the weights of a ResNet, not of a DFN; give them as --pretrained")
    block = Bottleneck if "backbone.layer1.0.conv3.weight" in state else BasicBlock
    stages = [f"backbone.layer{i}." for i in (1, 2, 3, 4)]
    counts = tuple(len({n.split(".")[2] for n in state if n.startswith(stage)}) for stage in stages)
    depth = next((name for name, layers in LAYERS.items() if layers == (block, counts)), None)
    if depth is None:
        raise CheckpointError(
            f"{where}: a backbone with {list(counts)} {block.__name__}s is not one of {', '.join(LAYERS)}"
        )
    border = any(name.startswith("border_pre_rrbs.") for name in state)
    return {
        "num_classes": out_channels("smooth_heads.3.conv.weight"),
        "backbone": depth,
        "stem": "deep" if "backbone.conv1.0.weight" in state else "conv7",
        "channels": out_channels("smooth_pre_rrbs.0.conv_1x1.weight"),
        "border_channels": out_channels("border_pre_rrbs.0.conv_1x1.weight") if border else 21,
        "global_context": "global_context.1.conv.weight" in state,
        "channel_attention": "cabs.0.channel_attention.fc.0.weight" in state,
        "deep_supervision": "smooth_heads.0.conv.weight" in state,
        "border": border,
    }
