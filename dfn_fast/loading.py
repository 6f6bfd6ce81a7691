"""A network from a checkpoint: of ours, which says how it was built, or of others, where names and shapes tell."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfn_fast.backbone import LAYERS, BasicBlock, Bottleneck
from dfn_fast.checkpoint import Mismatch, load_weights, read_file, state_dict_of
from dfn_fast.errors import CheckpointError, brief
from dfn_fast.model import FastDFN
from dfn_fast.model_config import build, checked_config
from dfn_fast.pretrained_folder import read_folder

FORMAT = 1


@dataclass(frozen=True)
class LoadedModel:
    """A network from a checkpoint, in eval mode, and what its scores mean."""

    model: FastDFN
    model_config: dict[str, Any]  # keyword arguments of the network
    classes: tuple[str, ...]
    palette: np.ndarray  # [K, 3] RGB uint8
    dataset: str | None  # what the file says that it was trained on
    mismatch: Mismatch  # what strict=False let pass
    border_width: int | None  # of the border targets that it was trained on, where the file says


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    num_classes: int | None = None,
    channels_last: bool = False,
    strict: bool = True,
) -> LoadedModel:
    """The network in a checkpoint of ours, in a folder that ``save_pretrained`` wrote, or in other people's
    checkpoint, whose configuration is then inferred.

    ``num_classes`` is the class count that the caller needs; another one in the file is an error. Class names and
    colours that the file does not hold are those of VOC, Cityscapes and CamVid at 21, 19 and 11 classes, else
    "class i". Raises :class:`CheckpointError`.
    """
    content = read_folder(path) if Path(path).is_dir() else read_file(path)
    ours = "model_config" in content
    found = content.get("format")
    if ours and (type(found) is not int or found != FORMAT):
        raise CheckpointError(
            f"{path}: expected checkpoint format {FORMAT}, got {brief(found)}; "
            "use the version of dfn_fast that wrote it, or save its weights alone there"
        )
    state = state_dict_of(content, str(path))
    given = content["model_config"] if ours else infer_model_config(state, str(path))
    config = checked_config(given, state, str(path))
    if num_classes is not None and config["num_classes"] != num_classes:
        raise CheckpointError(
            f"{path}: this network has {config['num_classes']} classes, but {num_classes} are needed; "
            "choose the data set that it was trained on, or another checkpoint"
        )
    classes, palette = _class_table(content, config["num_classes"], path)
    model = build(FastDFN, config)
    mismatch = load_weights(model, state, strict=strict, where=str(path))
    model.to(device).eval()
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    dataset, border_width = _training(content, path) if ours else (None, None)
    return LoadedModel(model, config, classes, palette, dataset, mismatch, border_width)


def _training(content: Mapping[str, Any], path: str | Path) -> tuple[str | None, int | None]:
    """The data set and the border width that a checkpoint of ours was trained with, where it says."""
    dataset, config = content.get("dataset"), content.get("config") or {}
    border_width = config.get("border_width") if isinstance(config, Mapping) else config
    if not isinstance(dataset, str | None) or not isinstance(border_width, int | None):
        raise CheckpointError(
            f"{path}: expected a data set's name and a border width, got {brief(dataset)} and {brief(border_width)}; "
            "copy or save the checkpoint again"
        )
    return dataset, border_width


def _class_table(content: Mapping[str, Any], num_classes: int, path: str | Path) -> tuple[tuple[str, ...], np.ndarray]:
    from dfn_fast.data.camvid import CamVidDataset
    from dfn_fast.data.cityscapes import CityscapesDataset
    from dfn_fast.data.voc import VocDataset, voc_palette

    if "classes" in content and "palette" in content:
        classes, palette = content["classes"], content["palette"]
        if not (_is_list(classes, str) and _is_list(palette, list | tuple) and all(map(_is_colour, palette))):
            raise CheckpointError(
                f"{path}: expected names and colours [r, g, b] of 0..255, got {brief(classes)} and {brief(palette)}; "
                "copy or save the checkpoint again"
            )
        if not len(classes) == len(palette) == num_classes:
            raise CheckpointError(
                f"{path}: expected names and colours of {num_classes} classes, got {len(classes)} and {len(palette)}"
            )
        return tuple(classes), np.array(palette, np.uint8)
    for known in (VocDataset, CityscapesDataset, CamVidDataset):
        if len(known.classes) == num_classes:
            return known.classes, known.palette.copy()
    return tuple(f"class {i}" for i in range(num_classes)), voc_palette(num_classes)


def _is_list(value: Any, kind: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, kind) for item in value)


def _is_colour(value: Any) -> bool:
    return _is_list(value, int) and len(value) == 3 and all(0 <= channel <= 255 for channel in value)


def infer_model_config(state: Mapping[str, Tensor], where: str = "the checkpoint") -> dict[str, Any]:
    """The keyword arguments of the network that ``state`` belongs to, from its names and shapes.

    Raises :class:`CheckpointError` where a name that tells is not there, or where the backbone is no known ResNet.
    """

    def out_channels(name: str) -> int:
        if name not in state:
            raise CheckpointError(f"{where}: expected the weights of a DFN, but there is no {name}")
        if state[name].ndim != 4:
            raise CheckpointError(f"{where}: expected the weights of a DFN, but {name} is no convolution")
        return state[name].shape[0]

    if "layer1.0.conv1.weight" in state:
        raise CheckpointError(f"{where}: these are the weights of a ResNet, not of a DFN; give them as --pretrained")
    block = Bottleneck if "backbone.layer1.0.conv3.weight" in state else BasicBlock
    stages = [f"backbone.layer{i}." for i in (1, 2, 3, 4)]
    counts = tuple(len({n.split(".")[2] for n in state if n.startswith(stage)}) for stage in stages)
    depth = next((name for name, layers in LAYERS.items() if layers == (block, counts)), None)
    if depth is None:
        raise CheckpointError(
            f"{where}: a backbone with {list(counts)} {block.__name__}s is none of {', '.join(LAYERS)}"
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
