"""Weights and checkpoint files: written whole or not at all, and read without running any code in them.

A training checkpoint is one dictionary of tensors and plain values::

    format        1
    model         state dict
    model_config  keyword arguments of the network, num_classes among them
    classes       K names            palette  K times [r, g, b]            dataset  its name
    config, optimizer, scaler, random, position      what the trainer needs to continue

Other people's files are read too: a bare state dict, or one under ``model``, ``state_dict`` or ``model_state_dict``.

Each record of the zip file (a tensor, or the pickle of everything else) carries a CRC-32. ``torch.save`` writes it,
``torch.load`` ignores it, and :func:`read_file` checks it.
"""

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dfn_fast.errors import CheckpointError
from dfn_fast.files import replacing, require_regular
from dfn_fast.runtime.machine import memory_bytes

FORMAT = 1

ZIP = b"PK\x03\x04"  # the first bytes of torch.save's files
SLACK = 1 << 20  # bytes that an archive may unpack to beyond its size: other writers compress the small parts


def save_atomic(content: dict[str, Any], path: str | Path, previous: str | Path | None = None) -> None:
    """Writes ``content`` with ``torch.save`` to a temporary file, syncs it and renames it to ``path``.

    If ``previous`` is given, the old file is kept under that name. Raises :class:`CheckpointError` if the file cannot
    be written, or if ``content`` holds something that :func:`read_file` would refuse; the old file is then unchanged.
    """
    refused = _not_plain(content, "content")
    if refused:
        raise CheckpointError(f"{path}: {refused}, which could not be read back; save tensors and plain values only")
    write_whole(Path(path), lambda file: _save_with_checksums(content, file), previous)


def _save_with_checksums(content: dict[str, Any], file: IO[bytes]) -> None:
    wanted = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)  # whatever the program around us chose for its own files
    try:
        torch.save(content, file)
    finally:
        torch.serialization.set_crc32_options(wanted)


def write_whole(path: Path, write: Callable[[IO[bytes]], Any], previous: str | Path | None = None) -> None:
    try:
        with replacing(path, previous) as file:
            write(file)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: could not be written ({error}); the file of that name, if there was one, is unchanged. "
            "Free some space, or choose a folder that exists and can be written"
        ) from error


def _not_plain(value: Any, where: str) -> str | None:
    """Names the first thing in ``value`` that ``weights_only`` would refuse; None if there is nothing."""
    items: list[tuple[str, Any]] = []
    if type(value) in (dict, OrderedDict):
        items = [(f"{where}[{key!r}]", item) for key, item in value.items()]
        items += [(f"a key of {where}", key) for key in value]
    elif type(value) in (list, tuple):
        items = [(f"{where}[{i}]", item) for i, item in enumerate(value)]
    elif not isinstance(value, Tensor) and type(value) not in (bool, int, float, str, type(None)):
        return f"{where} is a {type(value).__module__}.{type(value).__qualname__}"
    return next((text for place, item in items if (text := _not_plain(item, place))), None)


def read_file(path: str | Path) -> dict[str, Any]:
    """Reads the dictionary in a ``.safetensors`` file, or in a ``torch.save`` file of any other suffix, to the CPU.

    Code in the file is never run. Raises a :class:`CheckpointError` that says whether the file is missing, empty,
    truncated, damaged, not a checkpoint, larger than the machine's memory, or holds more than tensors and plain values.
    """
    path = Path(path)
    require_regular(path, CheckpointError, "checkpoint", memory_bytes())
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: this checkpoint does not exist; check the name and the folder") from None
    except OSError as error:
        raise CheckpointError(f"{path}: this checkpoint cannot be read ({error.strerror})") from error
    if not head:
        raise CheckpointError(f"{path}: this checkpoint is empty (0 bytes); copy or download it again")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if head.startswith(ZIP):
            _require_whole(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        _explain(path, head, error)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary of weights, got a {type(content).__name__}")
    return content


def _require_whole(path: Path) -> None:
    """Raises :class:`CheckpointError` if an archive unpacks to more than its own size, because torch.save does not
    compress, or if a record does not match its CRC-32.
    """
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(record.file_size for record in archive.infolist())
        if unpacked > path.stat().st_size + SLACK:
            raise CheckpointError(
                f"{path}: this checkpoint would unpack to {unpacked} bytes from {path.stat().st_size}; torch.save does "
                "not compress, so the file is damaged or made to exhaust memory; copy or download it again"
            )
        written = any(record.CRC for record in archive.infolist())  # all 0: torch.save was told to leave them out
        damaged = archive.testzip() if written else None
    if damaged:
        raise CheckpointError(
            f"{path}: this checkpoint is damaged (the checksum of its record {damaged!r} does not match); "
            "copy or download it again, or use the one before"
        )


def _explain(path: Path, head: bytes, error: Exception) -> NoReturn:
    """Raises the :class:`CheckpointError` for a file that exists but does not load. PyTorch's own text is left out,
    because it advises running the code in the file."""
    damaged = CheckpointError(f"{path}: this checkpoint is truncated or damaged; copy or download it again")
    is_zip, is_pickle = head.startswith(ZIP), head.startswith(b"\x80")
    members = _members(path) if is_zip else []
    has_pickle = is_pickle or any(name.endswith("/data.pkl") for name in members)
    is_script = any(name.endswith("/constants.pkl") for name in members)
    if isinstance(error, MemoryError):
        raise CheckpointError(f"{path}: this checkpoint does not fit into memory, or is damaged") from error
    if isinstance(error, SafetensorError):
        if head[8:9] == b"{":
            raise damaged from error
    elif is_script or (has_pickle and isinstance(error, pickle.UnpicklingError)):
        name = re.search(r"GLOBAL (\w[\w.]+)", str(error))
        if not (name or is_script or is_pickle):
            raise damaged from error
        raise CheckpointError(
            f"{path}: this file has code in it ({name[1][:100] if name else 'Python objects'}). Loading it could run "
            "anything, so it is refused. Where it was made, save only the weights, with "
            "torch.save(model.state_dict(), FILE) or as safetensors, and give that file"
        ) from error
    elif has_pickle or (is_zip and not members):
        raise damaged from error
    expected = "safetensors" if isinstance(error, SafetensorError) else "torch.save"
    raise CheckpointError(
        f"{path}: this is not a checkpoint (it starts with {head!r}); give a file that {expected} wrote"
    ) from error


def _members(path: Path) -> list[str]:
    """The names in a zip archive; none if its directory cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception:  # zipfile raises nearly anything for a damaged directory
        return []
