"""Loads a network from a checkpoint: ours say how it was built; for others, names and shapes tell."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch

from dfn_fast.checkpoint.archive import FORMAT, read_file
from dfn_fast.checkpoint.folder import read_folder
from dfn_fast.checkpoint.weights import Mismatch, build, load_weights, ready, state_dict_of
from dfn_fast.data.datasets.camvid import CamVidDataset
from dfn_fast.data.datasets.cityscapes import CityscapesDataset
from dfn_fast.data.datasets.classes import MAX_NAME
from dfn_fast.data.datasets.voc import VocDataset, voc_palette
from dfn_fast.errors import CheckpointError, brief
from dfn_fast.network.arguments import checked_arguments, infer_arguments
from dfn_fast.network.fast import FastDFN


@dataclass(frozen=True)
class LoadedModel:
    """A network from a checkpoint, in eval mode, and what its scores mean."""

    model: FastDFN
    model_config: dict[str, Any]  # keyword arguments of the network
    classes: tuple[str, ...]
    palette: np.ndarray  # [K, 3] RGB uint8
    dataset: str | None  # the one that it was trained on, if the file says
    mismatch: Mismatch  # empty unless strict=False
    border_width: int | None  # of the border targets that it was trained on, if the file says
    ignore_value: int | None = None  # of the masks that it was trained on
    label_offset: int = 0


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    num_classes: int | None = None,
    channels_last: bool = False,
    strict: bool = True,
) -> LoadedModel:
    """Loads our checkpoint, a folder that ``save_pretrained`` wrote, or other people's checkpoint, whose configuration
    is then inferred.

    ``num_classes`` is the class count that the caller needs; another one in the file is an error. If the file has no
    class names and colours, 21, 19 and 11 classes get those of VOC, Cityscapes and CamVid, other counts "class i" and
    VOC's colours. Raises :class:`CheckpointError`.
    """
    content = read_folder(path) if Path(path).is_dir() else read_file(path)
    ours = "model_config" in content
    found = content.get("format")
    if ours and (type(found) is not int or found != FORMAT):
        raise CheckpointError(
            f"{path}: expected checkpoint format {FORMAT}, got {brief(found)}; "
            "use the version of dfn_fast that wrote it, or save only its weights there"
        )
    state = state_dict_of(content, str(path))
    given = content["model_config"] if ours else infer_arguments(state, str(path))
    config = checked_arguments(FastDFN, given, state, str(path))
    if num_classes is not None and config["num_classes"] != num_classes:
        raise CheckpointError(
            f"{path}: this network has {config['num_classes']} classes, but {num_classes} are needed; "
            "choose the data set that it was trained on, or another checkpoint"
        )
    classes, palette = _class_table(content, config["num_classes"], path)
    model = build(FastDFN, config, random=not strict)
    mismatch = load_weights(model, state, strict=strict, where=str(path), remedy="")
    ready(model, device, channels_last)
    dataset, border_width, ignore_value, label_offset = _training(content, path) if ours else (None, None, None, 0)
    return LoadedModel(model, config, classes, palette, dataset, mismatch, border_width, ignore_value, label_offset)


def _training(content: Mapping[str, Any], path: str | Path) -> tuple[str | None, int | None, int | None, int]:
    """The data set, border width, ignored value and offset that our checkpoint was trained with, if it says."""
    dataset, config = content.get("dataset"), content.get("config") or {}
    border_width = config.get("border_width") if isinstance(config, Mapping) else config
    if not isinstance(dataset, str | None) or type(border_width) not in (int, NoneType):  # True is an int
        raise CheckpointError(
            f"{path}: expected a data set's name and a border width, got {brief(dataset)} and {brief(border_width)}; "
            "copy or save the checkpoint again"
        )
    numbers = (config.get("ignore_value"), config.get("label_offset", 0)) if isinstance(config, Mapping) else (None, 0)
    if type(numbers[0]) not in (int, NoneType) or type(numbers[1]) is not int:
        raise CheckpointError(
            f"{path}: expected the numbers of ignore_value and label_offset, got {brief(numbers)}; "
            "copy or save the checkpoint again"
        )
    return dataset, border_width, *numbers


def _class_table(content: Mapping[str, Any], num_classes: int, path: str | Path) -> tuple[tuple[str, ...], np.ndarray]:
    if "classes" in content and "palette" in content:
        classes, palette = content["classes"], content["palette"]
        if not (_is_list(classes, str) and _is_list(palette, list | tuple) and all(map(_is_colour, palette))):
            raise CheckpointError(
                f"{path}: expected names and colours [r, g, b] of 0..255, got {brief(classes)} and {brief(palette)}; "
                "copy or save the checkpoint again"
            )
        if long := [name for name in classes if len(name) > MAX_NAME]:
            raise CheckpointError(
                f"{path}: expected names of classes of at most {MAX_NAME} characters, got {brief(long[0])}; "
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
