"""Names for the parts of a step, which a profile shows; they cost nothing where none is taken."""

import contextlib
from collections.abc import Iterator

import torch

PREFIX = "dfn: "
_profiling = False


def region(name: str) -> contextlib.AbstractContextManager:
    """The part ``name`` of the network or of the step, from here to the end of the ``with`` statement."""
    # Asked first: inside torch.compile the switch would be a guard, and turning it a compilation.
    if torch.compiler.is_compiling() or not _profiling:
        return contextlib.nullcontext()
    return torch.profiler.record_function(PREFIX + name)


@contextlib.contextmanager
def named_regions() -> Iterator[None]:
    """Regions are recorded inside."""
    global _profiling
    before, _profiling = _profiling, True
    try:
        yield
    finally:
        _profiling = before
