"""What is compiled without a GPU: each kernel with each entry of the tuning tables, for every architecture."""

import importlib
import pkgutil
from types import ModuleType
from typing import Any, NamedTuple

import dfn_kernels


class CompileCase(NamedTuple):
    """One specialisation of one kernel, as the compiler sees it."""

    kernel: Any  # the @triton.jit function
    signature: dict[str, Any]  # run-time argument -> type, such as "*bf16" or "i32"
    constexprs: dict[str, Any]
    divisible: tuple[str, ...]  # run-time arguments that are multiples of 16 (pointers: 16-byte aligned)
    num_warps: int
    num_stages: int
    streaming: tuple[str, ...]  # operands that must move in 16-byte accesses; empty where none must
    note: str  # what the case stands for, such as "bf16, 512 channels"


def operators() -> dict[str, ModuleType]:
    """The operators' modules by name: the public modules that list what is to be compiled."""
    names = [m.name for m in pkgutil.iter_modules(dfn_kernels.__path__) if not m.name.startswith("_")]
    modules = {name: importlib.import_module(f"dfn_kernels.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "compile_cases")}
