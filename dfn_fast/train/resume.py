"""What a continued run shares with the run that wrote its checkpoint: configuration, data, and finite numbers."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfn_fast import cli
from dfn_fast.config import TrainConfig
from dfn_fast.data.base import SegmentationDataset
from dfn_fast.errors import CheckpointError, ConfigError, DataError, brief, listed
from dfn_fast.runtime.machine import device_name
from dfn_fast.train.options import RESUMABLE
from dfn_fast.trainer.trainer import Trainer

BETWEEN = "\0"  # stands in no file name


def require_same_config(config: TrainConfig, content: dict[str, Any], checkpoint: Path, config_file: Path) -> None:
    """Raises :class:`ConfigError` if a field that decides the result is not what the checkpoint was written with."""
    values = content.get("config")
    if not isinstance(values, dict):
        raise CheckpointError(f"{checkpoint}: expected the configuration of its run, got {brief(values)}")
    before = TrainConfig.from_dict(values, str(checkpoint))
    for field in dataclasses.fields(TrainConfig):
        ours, theirs = getattr(config, field.name), getattr(before, field.name)
        if field.name not in RESUMABLE and ours != theirs:
            raise ConfigError(
                f"{config_file}: {field.name} is {brief(ours)}, but {checkpoint} was written with {brief(theirs)}; "
                f"set it back, or start a new run with --config, --{cli.dashed(field.name)} and --weights"
            )


def data_record(train_set: SegmentationDataset, val_set: SegmentationDataset) -> dict[str, str]:
    """The names of the samples of both splits in order, for a checkpoint."""
    return {"train": BETWEEN.join(train_set.names()), "val": BETWEEN.join(val_set.names())}


def require_same_data(
    content: dict[str, Any],
    checkpoint: Path,
    train_set: SegmentationDataset,
    val_set: SegmentationDataset,
    *,
    tell: bool = True,
) -> None:
    """Raises :class:`DataError` if classes or samples are not those that the checkpoint was written with.

    A checkpoint of an earlier version holds the classes only, which a note says, with ``tell``.
    """
    remedy = "restore the data set as it was, or start a new run with --config and --weights"
    classes = list(content["classes"])
    if classes != list(train_set.classes):
        raise DataError(
            f"{checkpoint}: its run has the classes {listed(map(brief, classes))}, but the data set now has "
            f"{listed(map(brief, train_set.classes))}; {remedy}"
        )
    record = content.get("data")
    if record is None and tell:
        print(
            f"note: {checkpoint} is of an earlier version and does not say which images it was trained on; "
            "the run continues as if they were the same",
            file=sys.stderr,
        )
    if record is None:
        return
    for part, dataset in (("train", train_set), ("val", val_set)):
        before, now = record[part].split(BETWEEN), dataset.names()
        if before != now:
            raise DataError(
                f"{checkpoint}: split {dataset.split!r} of {dataset.where} had {len(before)} images and now has "
                f"{len(now)}{_changes(before, now)}; {remedy}"
            )


def _changes(before: list[str], now: list[str]) -> str:
    gone, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
    parts = [f"{what} {listed(names)}" for what, names in (("without", gone), ("with the new", new)) if names]
    return f" ({'; '.join(parts) or 'in another order'})"


def machine_record(trainer: Trainer) -> dict[str, Any]:
    """What may change the last bits of a run's numbers, for a checkpoint: the device, threads of a CPU, processes."""
    execution = trainer.execution()
    return {
        "device": device_name(trainer.device),
        **{name: execution[name] for name in ("amp", "compile", "processes")},
    }


def tell_of_another_machine(content: dict[str, Any], checkpoint: Path, now: dict[str, Any]) -> None:
    """Prints in what the machine differs from the one that wrote the checkpoint, if the checkpoint says."""
    before = content.get("machine", now)
    changed = [f"{name} {before.get(name)!r}, now {now[name]!r}" for name in now if before.get(name) != now[name]]
    if changed:
        print(
            f"note: {checkpoint} was written with {'; '.join(changed)}: the numbers may differ from those of an "
            "undisturbed run in their last bits",
            file=sys.stderr,
        )


def require_finite(content: dict[str, Any], checkpoint: Path) -> None:
    """Raises :class:`CheckpointError` if weights or momenta are nan or infinite, or too large for float32."""
    parts = {name: content[name] for name in ("model", "optimizer", "scaler") if name in content}
    broken = [name for name, tensor in _tensors(parts, "") if not torch.isfinite(tensor.float()).all()]
    if broken:
        raise CheckpointError(
            f"{checkpoint}: {len(broken)} tensors hold nan or infinity: {listed(broken)}; remove this file to continue "
            "from previous.pth, or start a new run from best.pth with --weights"
        )


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dictionaries, and every float as one, with the keys that lead there."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, float):
        yield name, torch.tensor(value)
