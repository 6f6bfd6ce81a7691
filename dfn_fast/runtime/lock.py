"""A lock file: only one process at a time works in a folder."""

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked(path: Path, refused: Callable[[str], Exception]) -> Iterator[None]:
    """Holds a lock on the file ``path``; raises ``refused(holder)`` if another process holds it.

    The system releases the lock when its process ends, even if that is killed; the file, which says who has the lock,
    may then stay. Processes that the holder forks do not have the lock. Where the system or the file system has no
    locks, nothing is locked.
    """
    handle = _take(path, refused) if fcntl else None
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):  # it may have gone with its folder
                os.unlink(path)
            os.close(handle)


def _take(path: Path, refused: Callable[[str], Exception]) -> int | None:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return handle
            os.close(handle)  # the one before us has just removed the file
        except OSError as error:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
            os.close(handle)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise refused(holder or "another process") from None
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                return None
            raise
