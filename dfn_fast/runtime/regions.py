"""Names for the parts of a step, shown in a profile; they cost nothing while none is taken."""

import contextlib
from collections.abc import Iterator

import torch

PREFIX = "dfn: "
_profiling = False


def region(name: str) -> contextlib.AbstractContextManager:
    """Marks the ``with`` block as the part ``name`` of the network or of the step."""
    # Checked first: inside torch.compile the switch would be a guard, and changing it would recompile.
    if torch.compiler.is_compiling() or not _profiling:
        return contextlib.nullcontext()
    return torch.profiler.record_function(PREFIX + name)


@contextlib.contextmanager
def named_regions() -> Iterator[None]:
    """Records regions inside the ``with`` block."""
    global _profiling
    before, _profiling = _profiling, True
    try:
        yield
    finally:
        _profiling = before
