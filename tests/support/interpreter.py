"""Triton's interpreter without the work whose result it throws away, which is more than half of it."""

import functools
import inspect
from dataclasses import replace
from typing import Any

import pytest


def skip_needless_work(patch: pytest.MonkeyPatch) -> None:
    """Leaves out what the interpreter computes and does not use, for as long as ``patch`` holds.

    It computes each sum and product of integers again in 64 bits to see an overflow, and then asserts nothing, because
    only its debug option does. It looks through Triton's language for functions to replace at each call of one kernel
    function by another, though the launch has replaced them all.
    """
    from triton.runtime import interpreter

    builder, replace_functions, language = interpreter.interpreter_builder, interpreter._patch_builtin, interpreter.tl
    if not builder.options.debug:
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
    first: dict[Any, Any] = {}  # the first function of each module or class, by which one tells whether it is replaced

    @functools.wraps(replace_functions)
    def replace_once(package: Any, *rest: Any) -> None:
        if package not in first:
            members = inspect.getmembers(package, language.core.is_builtin)
            first[package] = members[0][0] if members else None
        name = first[package]
        if name and language.core.is_builtin(getattr(package, name)):
            replace_functions(package, *rest)

    patch.setattr(interpreter, "_patch_builtin", replace_once)
