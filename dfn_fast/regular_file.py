"""The one check before a file is opened: that reading it can end."""

import os
import stat
from pathlib import Path

from dfn_fast.errors import UserError

MAX_TEXT = 1 << 28  # bytes of a list, a table of classes or a configuration
_KINDS = ((stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISDIR, "folder"))


def require_regular(path: str | Path, error: type[UserError], what: str, max_bytes: int | None = None) -> None:
    """Raises ``error`` for what is there and is no regular file, or has more than ``max_bytes``.

    Opening a pipe waits for its other end, and a device such as /dev/zero never ends. What is not there, or may not
    be looked at, is left to whoever opens it.
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
