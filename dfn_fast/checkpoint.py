"""Weights and checkpoint files: read without running code that is in them, fitted to a model by name and shape, and
written whole or not at all.

A training checkpoint is one dictionary of tensors and plain values::

    format        1
    model         state dict
    model_config  keyword arguments of the network, num_classes among them
    classes       K names            palette  K times [r, g, b]            dataset  its name
    config, optimizer, scaler, random, position      what the trainer needs to continue

Other people's files are read too: a bare state dict, or one below ``model``, ``state_dict`` or ``model_state_dict``.

Each record of the file (a tensor, or the pickle of all that is no tensor) carries its CRC-32, as the zip format has it.
``torch.save`` writes them and ``torch.load`` reads past them; :func:`read_file` compares.
"""

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dfn_fast.atomic import replacing
from dfn_fast.errors import CheckpointError, brief
from dfn_fast.regular_file import require_regular

STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict")
TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".tar")
ZIP = b"PK\x03\x04"  # what torch.save's files begin with
SHOWN = 5  # names of each kind in the text of a mismatch
EXCERPT = 500  # characters of names in any text
MAX_NESTING = 10  # of a state dict in a checkpoint
SLACK = 1 << 20  # bytes that an archive may unpack to beyond its size: others than ours compress their small parts
DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8}
DTYPES |= {torch.int8, torch.int16, torch.int32, torch.int64}


def save_atomic(content: dict[str, Any], path: str | Path, previous: str | Path | None = None) -> None:
    """``torch.save`` to a temporary file that takes the name ``path`` when it is whole and on disk; the file that had
    this name becomes ``previous``, where one is given.

    Raises :class:`CheckpointError` where it cannot be written, or where ``content`` holds something that
    :func:`read_file` would refuse; the file that was there before is unchanged then.
    """
    refused = _not_plain(content, "content")
    if refused:
        raise CheckpointError(f"{path}: {refused}, which could not be read back; save tensors and plain values only")
    _write(Path(path), lambda file: _save_with_checksums(content, file), previous)


def _save_with_checksums(content: dict[str, Any], file: IO[bytes]) -> None:
    wanted = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)  # whatever the program around us chose for its own files
    try:
        torch.save(content, file)
    finally:
        torch.serialization.set_crc32_options(wanted)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """The model's state dict, in the published names and shapes, as safetensors or ``torch.save`` file by suffix."""
    path = Path(path)
    # safetensors refuses channels_last tensors.
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict_of(model.state_dict()).items()}
    if path.suffix == ".safetensors":
        _write(path, lambda file: file.write(safetensors.torch.save(state)))
    elif path.suffix in TORCH_SUFFIXES:
        save_atomic(state, path)
    else:
        raise CheckpointError(f"{path}: expected one of the suffixes .safetensors {' '.join(TORCH_SUFFIXES)}")


def _write(path: Path, write: Callable[[IO[bytes]], Any], previous: str | Path | None = None) -> None:
    try:
        with replacing(path, previous) as file:
            write(file)
    except (OSError, RuntimeError) as error:  # torch.save hides the system's error behind a RuntimeError of its own
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        raise CheckpointError(
            f"{path}: could not be written ({cause or error}); the file of that name, if there was one, is unchanged. "
            "Free some space, or choose a folder that exists and can be written"
        ) from error


def _not_plain(value: Any, where: str) -> str | None:
    """What ``weights_only`` would refuse in ``value``, if anything."""
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
    """The dictionary in a ``.safetensors`` file, or in one of any other suffix that ``torch.save`` wrote, on the CPU.

    Code in the file is never run. Raises :class:`CheckpointError` that says whether the file is missing, empty, cut
    short, damaged, no checkpoint at all, or holds more than tensors and plain values.
    """
    path = Path(path)
    require_regular(path, CheckpointError, "checkpoint")
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
    """Raises :class:`CheckpointError` for an archive that unpacks to more than it is, torch.save compressing nothing,
    and for one with a record that does not fit its CRC-32.
    """
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(record.file_size for record in archive.infolist())
        if unpacked > path.stat().st_size + SLACK:
            raise CheckpointError(
                f"{path}: this checkpoint would unpack to {unpacked} bytes from {path.stat().st_size}; torch.save does "
                "not compress, so it is damaged or made to fill the memory; copy or download it again"
            )
        written = any(record.CRC for record in archive.infolist())  # all 0: torch.save was told to leave them out
        damaged = archive.testzip() if written else None
    if damaged:
        raise CheckpointError(
            f"{path}: this checkpoint is damaged (the checksum of its record {damaged!r} does not fit); "
            "copy or download it again, or use the one before"
        )


def _explain(path: Path, head: bytes, error: Exception) -> NoReturn:
    """Raises the :class:`CheckpointError` for a file that exists and does not load. PyTorch's own text is left out:
    it advises loading the file with the code in it."""
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
            f"{path}: this file has code in it ({name[1][:100] if name else 'Python objects'}): loading it could run "
            "anything, so it is refused. Where it was made, save the weights alone, torch.save(model.state_dict(), "
            "FILE) or safetensors, and give that file"
        ) from error
    elif has_pickle or (is_zip and not members):
        raise damaged from error
    expected = "safetensors" if isinstance(error, SafetensorError) else "torch.save"
    raise CheckpointError(
        f"{path}: this is not a checkpoint (it starts with {head!r}); give a file that {expected} wrote"
    ) from error


def _members(path: Path) -> list[str]:
    """The names in a zip archive; none where its directory cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception:  # zipfile raises nearly anything for a damaged directory
        return []


def state_dict_of(content: Mapping[str, Any], where: str = "the checkpoint") -> dict[str, Tensor]:
    """The state dict in a checkpoint's content, bare or below one of ``STATE_DICT_KEYS``, under plain names: without
    the ``module.`` of (Distributed)DataParallel and the ``_orig_mod.`` of ``torch.compile``, however they are nested.
    """
    for _ in range(MAX_NESTING):
        below = next((content[key] for key in STATE_DICT_KEYS if isinstance(content.get(key), Mapping)), None)
        if below is None:
            break
        content = below
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        found = ", ".join(name if isinstance(name, str) else brief(name) for name in list(content)[:SHOWN])
        raise CheckpointError(
            f"{where}: expected a state dict, bare or below {', '.join(map(repr, STATE_DICT_KEYS))}; found "
            f"{found[:EXCERPT] or 'nothing'}"
        )
    lying = [name for name, tensor in tensors.items() if not _is_plain_tensor(tensor)]
    if lying:
        raise CheckpointError(
            f"{where}: {len(lying)} tensors have values that are not in the file, or not one by one: "
            f"{', '.join(lying[:SHOWN])[:EXCERPT]}; save dense tensors of real numbers"
        )
    state = {_plain_name(name): tensor for name, tensor in tensors.items()}
    if len(state) < len(tensors):
        raise CheckpointError(f"{where}: holds the same weights twice, with and without the prefix of a wrapper")
    return state


def _is_plain_tensor(tensor: Tensor) -> bool:
    """Whether each element is a number in memory; a stride of 0 makes gigabytes of one number."""
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
    """Where a state dict does not fit a model; false where it fits. ``str()`` names the first few of each kind."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()  # name, the model's, the file's

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        shapes = [f"{name} (model {list(ours)}, file {list(theirs)})" for name, ours, theirs in self.wrong_shape]
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "wrong shape": shapes}
        return "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:SHOWN])[:EXCERPT]}{', ...' if len(names) > SHOWN else ''}"
            for kind, names in kinds.items()
            if names
        )


def load_weights(
    model: nn.Module, source: str | Path | Mapping[str, Any], *, strict: bool = True, where: str | None = None
) -> Mismatch:
    """Loads a checkpoint, by file or content, into ``model`` and returns what did not fit.

    ``strict=False`` loads the tensors that fit by name and shape. ``num_batches_tracked`` may be missing, as in
    checkpoints of PyTorch 0.4. ``where`` names the source in errors. Raises :class:`CheckpointError`, the model
    unchanged, where something does not fit and ``strict`` is set, where nothing fits, and for weights that are nan or
    infinite.
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
        remedy = "" if not fitting else ", or load what fits with strict=False (--no-strict)"
        raise CheckpointError(f"{where} does not fit the model: {mismatch}. Build the model as it was saved{remedy}")
    broken = [n for n, t in fitting.items() if not torch.isfinite(t).all()]
    if broken:
        raise CheckpointError(
            f"{where}: {len(broken)} tensors hold nan or infinity: {', '.join(broken[:SHOWN])[:EXCERPT]}. "
            "Use a checkpoint from before the training diverged"
        )
    model.load_state_dict({own[n][0]: t for n, t in fitting.items()}, strict=False)
    return mismatch
