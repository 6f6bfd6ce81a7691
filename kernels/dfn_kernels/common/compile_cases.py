"""The cases to compile without a GPU: each kernel with each entry of the tuning tables, for every architecture."""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple


class CompileCase(NamedTuple):
    """One specialisation of one kernel, as the compiler sees it."""

    kernel: Any  # the @triton.jit function
    signature: dict[str, Any]  # run-time argument -> type, such as "*bf16" or "i32"
    constexprs: dict[str, Any]
    divisible: tuple[str, ...]  # run-time arguments that are multiples of 16 (pointers: 16-byte aligned)
    num_warps: int
    num_stages: int
    streaming: tuple[str, ...]  # operands that must move in 16-byte accesses; empty if none must
    note: str  # what the case stands for, such as "bf16, 512 channels"


def operators() -> dict[str, ModuleType]:
    """The operators' modules that list compile cases, by the last part of their name."""
    package = str(Path(__file__).parents[1])
    names = [m.name for m in pkgutil.walk_packages([package], "dfn_kernels.") if not m.name.endswith("_triton")]
    modules = {name.rpartition(".")[2]: importlib.import_module(name) for name in names}
    # Callable: the package `common` has this module under the same name.
    return {name: module for name, module in modules.items() if callable(getattr(module, "compile_cases", None))}
