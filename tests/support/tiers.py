"""Helpers that run more in the slow tier than in the fast one: examples of random inputs, and dtypes for each shape."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings

slow = pytest.mark.slow


def examples(few: int, many: int, options: dict[str, Any] | None = None, **strategies: Any) -> Callable[..., Any]:
    """``hypothesis.given`` with ``few`` examples in the fast tier and ``many``, starting with the same ones, in the
    slow tier. ``options`` are further hypothesis settings."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        common = {"deadline": None, "derandomize": True} | (options or {})
        runs = {n: settings(max_examples=n, **common)(given(**strategies)(test)) for n in (few, many)}

        @pytest.mark.parametrize("examples", [few, pytest.param(many, marks=slow)])
        def search(examples: int, **arguments: Any) -> None:
            runs[examples](**arguments)

        others = [p for p in inspect.signature(test).parameters.values() if p.name not in strategies]
        own = inspect.Parameter("examples", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        search.__signature__ = inspect.Signature([*others, own])  # type: ignore[attr-defined]
        search.__name__, search.__doc__, search.__module__ = test.__name__, test.__doc__, test.__module__
        search.pytestmark += getattr(test, "pytestmark", [])  # type: ignore[attr-defined]
        return search

    return decorate


def each_with_one_dtype(shapes: Sequence[Any], dtypes: Sequence[Any]) -> list[Any]:
    """Every pair of a shape and a dtype. In the fast tier each shape has one dtype, in rotation."""
    return [
        pytest.param(shape, dtype, marks=[] if i % len(dtypes) == j else slow, id=f"{shape}-{dtype}")
        for i, shape in enumerate(shapes)
        for j, dtype in enumerate(dtypes)
    ]
