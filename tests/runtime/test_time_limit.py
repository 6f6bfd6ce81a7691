"""A call with a limit: its result, its error, and the error of a call that takes too long."""

import threading
import time

import pytest

from dfn_fast.errors import DataError
from dfn_fast.runtime.time_limit import within


def test_the_result_and_the_error_of_the_call_are_the_callers():
    assert within(10, lambda: 3, DataError("late")) == 3
    with pytest.raises(ZeroDivisionError):
        within(10, lambda: 1 // 0, DataError("late"))


def test_a_call_that_hangs_is_left_behind():
    gate = threading.Event()
    begin = time.perf_counter()
    with pytest.raises(DataError, match="late"):
        within(0.05, gate.wait, DataError("late"))
    with pytest.raises(DataError, match="late"):
        within(0.05, gate.wait, lambda: DataError("late"))
    assert time.perf_counter() - begin < 5
    gate.set()


def test_without_a_limit_the_call_runs_in_the_callers_thread():
    assert within(0, threading.current_thread, DataError("late")) is threading.current_thread()
    assert within(5, threading.current_thread, DataError("late")) is not threading.current_thread()
