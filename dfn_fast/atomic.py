"""Files that are never half-written: everything goes to a temporary neighbour, is synced, and takes the name last."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: str | Path, previous: str | Path | None = None) -> Iterator[IO[bytes]]:
    """A binary file to write to; it replaces ``path`` when the block ends well, else ``path`` stays as it was.

    What ``path`` was until then is kept as ``previous``, where one is given. Wherever the process is killed, or the
    power fails, at least one of the two is whole.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # it may have gone with its folder
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """``text`` as the whole content of ``path``, in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


def _keep(path: Path, previous: str | Path) -> None:
    """``previous`` becomes a second name of ``path``; on a file system that has no hard links, its only one."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(previous)
        os.link(path, previous)
    except OSError:
        os.replace(path, previous)


_UMASK = threading.Lock()


def _umask() -> int:
    with _UMASK:  # it can only be read by setting it, and two threads at once could leave it at 0
        mask = os.umask(0)
        os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` survive a power cut, on systems where a folder can be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
