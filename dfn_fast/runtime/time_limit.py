"""A limit on the time of a call that may never return, such as the decoding of a file."""

import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def within(seconds: float, call: Callable[[], Result], error: Exception | Callable[[], Exception]) -> Result:
    """Returns what ``call()`` returns, or raises what it raises; raises ``error`` if it takes more than ``seconds``.

    ``error`` may be a function that makes it, where that costs something.

    The call runs in a thread of its own, because a decoder written in C cannot be interrupted. After the limit that
    thread goes on in the background, and ends with the process. ``seconds`` 0 is no limit, and needs no thread.
    """
    if not seconds:
        return call()
    answers: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except BaseException as raised:  # the caller decides what it means
            answers.put((None, raised))

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), name="within", daemon=True).start()
    with contextlib.suppress(queue.Empty):
        result, raised = answers.get(timeout=seconds)
        if raised is not None:
            raise raised
        return result  # type: ignore[return-value]
    raise error if isinstance(error, Exception) else error()
