"""Triton if it is installed; otherwise stand-ins that let the kernel modules be imported, but not launched."""

from typing import Any

try:
    import triton
    import triton.language as tl

    MISSING: str | None = None
except ImportError as error:  # macOS, Windows
    MISSING = str(error)

    class _Absent:
        """Any attribute of the missing package; as a decorator it leaves the function unchanged."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, function: Any = None, **settings: Any) -> Any:
            return function if callable(function) else self

    triton = tl = _Absent()  # type: ignore[assignment]

__all__ = ["MISSING", "tl", "triton"]
