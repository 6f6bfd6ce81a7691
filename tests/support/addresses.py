"""Finds the addresses that one program of a kernel uses. No memory is allocated, even for tensors of more than 2^31
elements. Runs in Triton's interpreter, whose 32-bit arithmetic wraps as it does on a GPU."""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor


class _Memory:
    """Stands in for the interpreter's memory: loads return 0, and every address is recorded."""

    def __init__(self) -> None:
        self.addresses: list[np.ndarray] = []

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> np.ndarray:
        self.addresses.append(pointers[mask.astype(bool)])
        return np.zeros(pointers.shape, dtype)

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        self.addresses.append(pointers[mask.astype(bool)])


def offsets_of_program(
    monkeypatch,
    kernel: Any,
    program: int,
    programs: int,
    pointers: dict[str, torch.dtype | tuple[torch.dtype, ...]],
    **arguments: Any,
) -> dict[str, Tensor]:
    """The element offsets (sorted, unique) that ``program`` of ``programs`` uses from each pointer.

    A tuple of dtypes is a tuple of pointers; theirs are found as ``name[0]``, ``name[1]`` and so on.
    """
    from triton.runtime import interpreter

    memory, builder = _Memory(), interpreter.interpreter_builder
    monkeypatch.setattr(interpreter, "_interpreter", memory)
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    monkeypatch.setattr(builder, "set_grid_dim", lambda *dim: setattr(builder, "grid_dim", (programs, 1, 1)))
    monkeypatch.setattr(builder, "set_grid_idx", lambda *idx: setattr(builder, "grid_idx", (program, 0, 0)))
    # Pointers are 2^48 bytes apart, so an address tells which one it belongs to, even if an offset is negative.
    places: dict[str, Any] = {}
    all_places: dict[str, _Pointer] = {}
    for name, dtypes in pointers.items():
        several = isinstance(dtypes, tuple)
        for i, dtype in enumerate(dtypes if several else (dtypes,)):
            all_places[f"{name}[{i}]" if several else name] = place = _Pointer(dtype, (len(all_places) + 1) << 48)
            places[name] = (*places.get(name, ()), place) if several else place
    kernel[(1,)](**places, **arguments)
    found = defaultdict(list)
    for address in np.concatenate([a.ravel() for a in memory.addresses]).astype(np.int64).tolist():
        name = list(all_places)[((address + (1 << 47)) >> 48) - 1]
        place = all_places[name]
        found[name].append((address - place.address) // place.dtype.itemsize)
    return {name: torch.tensor(offsets).unique() for name, offsets in found.items()}


class _Pointer:
    """Passes for a tensor in the interpreter: a dtype and an address."""

    def __init__(self, dtype: torch.dtype, address: int):
        self.dtype, self.address = dtype, address

    def data_ptr(self) -> int:
        return self.address
