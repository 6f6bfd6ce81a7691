"""What a forked process needs to run a network: a lock that is open, and one thread.

Of the threads of its parent only the forking one goes on in the child. A lock that another one held stays shut there,
and OpenMP waits for ever for its team.
"""

import os
import threading
import warnings

import torch

_first_call = threading.RLock()
_is_child = False


def first_call() -> threading.RLock:  # type: ignore[valid-type]  # a function until Python 3.13
    """The lock around everything that is built at the first call. It is open in a child, whoever held it."""
    return _first_call


def use_one_thread_in_a_child() -> None:
    """In a forked process, makes PyTorch run on one thread and says so once."""
    if _is_child and torch.get_num_threads() > 1:
        warnings.warn(
            f"this process is a fork: PyTorch runs on 1 thread here instead of {torch.get_num_threads()}, because "
            "OpenMP would wait for ever for the parent's; start it with the method 'spawn' to use them all",
            stacklevel=3,
        )
        torch.set_num_threads(1)


def _after_fork() -> None:
    global _first_call, _is_child
    _first_call, _is_child = threading.RLock(), True


os.register_at_fork(after_in_child=_after_fork)
