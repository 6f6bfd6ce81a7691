"""Files written whole or not at all, and the checks before a file is read.

A write goes to a temporary file in the same folder, is synced, and is renamed into place.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dfn_fast.errors import UserError

MAX_TEXT = 1 << 28  # bytes of a list, a table of classes or a configuration
_SHOWN = 32  # characters of a file's name in that of its temporary file, which may be no longer than others
_TEMPORARY = re.compile(r"\..*\.(.+)-(\d+)\.[a-z0-9_]{8}\.tmp(\.\w+)?", re.DOTALL)
_LONG_AGO = 24 * 3600  # seconds
_MOST_LINKS = 40  # that are followed, as in Linux
_KINDS = ((stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISDIR, "folder"))


@contextlib.contextmanager
def replacing(path: str | Path, previous: str | Path | None = None) -> Iterator[IO[bytes]]:
    """Yields a binary file that replaces ``path`` if the block succeeds; otherwise ``path`` is left unchanged.

    If ``path`` is a link, the file that it names is replaced, and the link stays. A new file has the permissions of the
    old one. A pipe, a terminal or another character device, which cannot be replaced, gets the content once the block
    has succeeded; a socket or a disk is refused. If ``previous`` is given, the old file is kept under that name.
    Whenever the process is killed or the power fails, at least one of the two is complete.

    Raises :class:`OSError`, also where PyTorch's writers hide it behind a RuntimeError of their own.
    """
    target = _behind_links(Path(path))
    with _naming_the_cause():
        if target is None or _is_stream(target):
            with tempfile.TemporaryFile() as file:
                yield file
                file.seek(0)
                _write_through(target or Path(path), file)
            return
        mode = _mode(target)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=temporary_prefix(target.name), suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, mode)
            if previous is not None and target.exists():
                _keep(target, Path(previous))
            os.replace(temporary, target)
        except BaseException:
            _unlink(Path(temporary))
            raise
        _sync_folder(target.parent)


def _behind_links(path: Path) -> Path | None:
    """The path that a chain of links ends at; None if it is an open file of a process, such as /dev/stdout.

    A file that is open elsewhere must not be replaced: whoever has it open would not see the new one.
    """
    for _ in range(_MOST_LINKS):
        if not path.is_symlink():
            return path
        folder = path.parent.resolve()
        if folder.is_relative_to("/proc"):
            return None
        path = folder / os.readlink(path)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _is_stream(path: Path) -> bool:
    """Whether ``path`` is a pipe or a character device. Raises OSError if nothing can be written there."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        kind = "disk" if stat.S_ISBLK(mode) else "socket"
        raise OSError(errno.EINVAL, f"it is a {kind}, expected a file", str(path))
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _write_through(path: Path, content: IO[bytes]) -> None:
    """Appends ``content`` to a pipe, a device or an open file. A pipe that nobody reads is an error, not a wait."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise OSError(errno.ENXIO, "nobody reads from it", str(path)) from None
    with os.fdopen(handle, "wb") as file:
        os.set_blocking(handle, True)
        shutil.copyfileobj(content, file)


@contextlib.contextmanager
def _naming_the_cause() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from error


def _mode(path: Path) -> int:
    """The permissions of a file to be written: those of the old file, or what the umask leaves of 0666."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return 0o666 & ~_umask()
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "it is write-protected", str(path))
    return mode


def temporary_prefix(name: str) -> str:
    """How the name of a temporary file for ``name`` begins: with that name, and the process that it belongs to."""
    return f".{name[:_SHOWN]}.{socket.gethostname()[:_SHOWN]}-{os.getpid()}."


def clear_leftovers(folder: Path) -> None:
    """Deletes the temporary files in ``folder`` of processes that were killed: on this machine, or a day ago."""
    with contextlib.suppress(OSError):  # no such folder
        for name in os.listdir(folder):
            match = _TEMPORARY.fullmatch(name)
            if match is None:
                continue
            path, here = folder / name, match[1] == socket.gethostname()[:_SHOWN]
            with contextlib.suppress(OSError):
                if not _runs(int(match[2])) if here else time.time() - path.stat().st_mtime > _LONG_AGO:
                    path.unlink()


def _runs(process: int) -> bool:
    if os.name != "posix":
        return True  # where this is not known; and there a signal 0 is a signal
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        pass
    return True


def write_text(path: str | Path, text: str) -> None:
    """Writes ``text`` as the whole content of ``path``, in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, content: Any) -> None:
    """Writes ``content`` as indented JSON; nan and infinity become null."""
    write_text(path, json.dumps(finite(content), indent=2) + "\n")


def _keep(path: Path, previous: Path) -> None:
    """Makes ``previous`` a second name of ``path``; on a file system without hard links, renames ``path`` to it.

    ``previous`` is there at every moment, and so is ``path`` where there are hard links.
    """
    link = previous.with_name(f".{previous.name[:_SHOWN]}.link.tmp")
    try:
        _unlink(link)
        os.link(path, link)
        os.replace(link, previous)
    except OSError:
        os.replace(path, previous)
    finally:
        _unlink(link)  # it stays where both names were of one file already


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


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
