"""Files written whole or not at all, and the checks before a file is read.

A write goes to a temporary file in the same folder, is synced, and is renamed into place.
"""

import contextlib
import json
import math
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dfn_fast.errors import UserError

MAX_TEXT = 1 << 28  # bytes of a list, a table of classes or a configuration
_KINDS = ((stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISDIR, "folder"))


@contextlib.contextmanager
def replacing(path: str | Path, previous: str | Path | None = None) -> Iterator[IO[bytes]]:
    """Yields a binary file that replaces ``path`` if the block succeeds; otherwise ``path`` is left unchanged.

    If ``previous`` is given, the old file is kept under that name. Whenever the process is killed or the power fails,
    at least one of the two is complete.
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
    """Writes ``text`` as the whole content of ``path``, in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, content: Any) -> None:
    """Writes ``content`` as indented JSON; nan and infinity become null."""
    write_text(path, json.dumps(finite(content), indent=2) + "\n")


def _keep(path: Path, previous: str | Path) -> None:
    """Makes ``previous`` a second name of ``path``; on a file system without hard links, renames ``path`` to it."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(previous)
        os.link(path, previous)
    except OSError:
        os.replace(path, previous)


_UMASK = threading.Lock()


def _umask() -> int:
    with _UMASK:  # the mask can only be read by setting it, and two threads at once could leave it at 0
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


def require_regular(path: str | Path, error: type[UserError], what: str, max_bytes: int | None = None) -> None:
    """Raises ``error`` if the path exists but is not a regular file, or is larger than ``max_bytes``.

    Opening a pipe waits for its other end, and a device such as /dev/zero never ends. A path that is missing or may
    not be examined is left to whoever opens it.
    """
    try:
        status = os.stat(path)
    except OSError:
        return
    except ValueError:  # a null character
        raise error(f"{str(path)!r}: no file can have this name") from None
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "device")
        raise error(f"{path}: expected a regular file, got a {kind}; check the name of this {what}")
    if max_bytes is not None and status.st_size > max_bytes:
        raise error(
            f"{path}: this {what} has {status.st_size} bytes, expected at most {max_bytes}; is it the right one?"
        )


def finite(value: Any) -> Any:
    """``value`` with every nan and infinity replaced by None, which JSON can represent."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
