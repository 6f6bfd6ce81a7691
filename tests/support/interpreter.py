"""Triton's interpreter without the work whose result it discards, which is more than half."""

import functools
import inspect
from dataclasses import replace
from typing import Any

import pytest


def skip_needless_work(patch: pytest.MonkeyPatch) -> None:
    """Skips work that the interpreter does and never uses, as long as ``patch`` is active.

    It recomputes each integer sum and product in 64 bits to detect overflow, but only its debug option then asserts.
    When one kernel function calls another, it searches Triton's language for functions to replace, although the launch
    has already replaced them all.
    """
    from triton.runtime import interpreter

    builder, replace_functions, language = interpreter.interpreter_builder, interpreter._patch_builtin, interpreter.tl
    if not builder.options.debug:
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
    first: dict[Any, Any] = {}  # the first function of each module or class: shows whether it is replaced

    @functools.wraps(replace_functions)
    def replace_once(package: Any, *rest: Any) -> None:
        if package not in first:
            members = inspect.getmembers(package, language.core.is_builtin)
            first[package] = members[0][0] if members else None
        name = first[package]
        if name and language.core.is_builtin(getattr(package, name)):
            replace_functions(package, *rest)

    patch.setattr(interpreter, "_patch_builtin", replace_once)
