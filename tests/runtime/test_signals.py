import os
import signal
import subprocess
import sys
import textwrap

import pytest

from dfn_fast.runtime.signals import Stopped, StopRequest


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_a_request(number, code):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.raise_if_requested()
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.exit_code == code
        with pytest.raises(Stopped):
            stop.raise_if_requested()
    assert signal.getsignal(number) is before


def test_the_second_signal_leaves_at_once():
    program = """
        import os, signal
        from dfn_fast.runtime.signals import StopRequest
        with StopRequest():
            os.kill(os.getpid(), signal.SIGINT)
            print("still here", flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            print("never reached")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "still here\n")
    assert "the last checkpoint on disk is complete" in done.stderr
