"""The round on a GPU: order, limits, results kept from a stopped step, and steps left for the next call."""

import contextlib
import fcntl
import json
import shlex
import subprocess
import sys
import time

import pytest

from benchmarks import gpu_round
from benchmarks.gpu_round import STEPS, Step
from dfn_fast.errors import ConfigError


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_round, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def go(tmp_path, *steps, minutes=1.0, camvid=""):
    return gpu_round.go(list(steps), tmp_path, minutes, camvid)


def test_steps_run_in_order_and_those_that_do_not_fit_are_left(tmp_path, results, capsys):
    failing = Step("failing", 0.1, "", 'python -c "raise SystemExit(3)"')
    done, left = go(
        tmp_path, Step("a", 0.1, "what a says", 'python -c "print(5)"'), Step("long", 5, "", "python no.py"), failing
    )
    assert [(found["step"], found["exit_code"], found["last_line"]) for found in done] == [
        ("a", 0, "5"),
        ("failing", 3, ""),
    ]
    assert left == ["long"]
    assert (tmp_path / "a.log").read_text() == "5\n"
    assert json.loads((tmp_path / "round.json").read_text()) == {"steps": done, "left": left}
    assert "a: what a says, about 0.1 minutes\n  exit 0 after 0.0 minutes: 5\n" in capsys.readouterr().out


@pytest.fixture
def ready(tmp_path, monkeypatch):
    """A file. The time of a step begins when the step has made it, however busy the machine is."""
    file = tmp_path / "ready"

    class Watched(subprocess.Popen):
        def wait(self, timeout=None):
            while not file.exists() and self.poll() is None:
                time.sleep(0.01)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Watched)
    return file


def sleeping(ready, on_signal, first=""):
    """A step that does ``first``, makes the file ``ready``, and sleeps; its limit is a twentieth of a second."""
    code = "import pathlib, signal, subprocess, sys, time\n"
    code += f"signal.signal(signal.SIGINT, {on_signal})\n{first}\n"
    code += f"pathlib.Path({str(ready)!r}).touch()\ntime.sleep(600)"
    return Step("sleeping", 0.01, "", f"python -c {shlex.quote(code)}", limit=0.001)


ANSWER = "lambda *_: (print('asked', flush=True), sys.exit(5))"


def test_a_step_is_stopped_at_its_limit_and_the_next_one_begins(tmp_path, results, ready):
    done, left = go(tmp_path, sleeping(ready, ANSWER), Step("next", 0.01, "", 'python -c "print(2)"'))
    # It was asked by SIGINT, and waited for: its exit code and its last words are there.
    expected = [(True, 5, "asked"), (False, 0, "2")]
    assert [(found["stopped"], found["exit_code"], found["last_line"]) for found in done] == expected
    assert left == []
    assert json.loads((tmp_path / "round.json").read_text()) == {"steps": done, "left": []}


def test_a_step_that_does_not_listen_is_killed(tmp_path, results, ready, monkeypatch):
    monkeypatch.setattr(gpu_round, "GRACE", 0.2)
    ((found,), _) = go(tmp_path, sleeping(ready, "signal.SIG_IGN"))
    assert found["stopped"]
    assert found["exit_code"] == -9


def test_what_a_stopped_step_started_ends_with_it(tmp_path, results, ready):
    held = tmp_path / "held"
    child = f"import fcntl, time; file = open({str(held)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
    child += "print(1, flush=True); time.sleep(600)"
    command = f"[sys.executable, '-c', {child!r}]"
    # The child ignores SIGINT, as its parent does when it starts it.
    first = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    first += f"child = subprocess.Popen({command}, stdout=subprocess.PIPE)\nchild.stdout.readline()\n"
    first += f"signal.signal(signal.SIGINT, {ANSWER})"
    ((found,), _) = go(tmp_path, sleeping(ready, ANSWER, first))
    assert (found["stopped"], found["exit_code"]) == (True, 5)
    assert is_free(held)


def is_free(file, seconds=10):
    """Whether no process locks ``file``; one that was killed may take a moment to end."""
    end = time.monotonic() + seconds
    with file.open() as opened:
        while time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            time.sleep(0.01)
    return False


def test_what_a_step_measured_lies_beside_its_log(tmp_path, results):
    results.mkdir()
    (results / "old.json").write_text("{}")
    gpu_round.os.utime(results / "old.json", (1, 1))
    code = f"import pathlib; (pathlib.Path({str(results)!r}) / 'new.json').write_text('[]')"
    done, _ = go(tmp_path / "out", Step("writes", 0.1, "", f"python -c {shlex.quote(code)}"))
    assert done[0]["exit_code"] == 0
    assert [path.name for path in (tmp_path / "out" / "results").iterdir()] == ["new.json"]


def test_nothing_is_learnt_without_images(tmp_path, results):
    step = Step("learning", 0.01, "", "python -c pass {camvid}")
    assert go(tmp_path, step) == ([], ["learning"])
    assert go(tmp_path, step, camvid="a folder")[1] == []


def test_commands_are_those_of_this_python(tmp_path):
    commands = {step.name: gpu_round.command_of(step, tmp_path, "cam vid") for step in STEPS}
    assert len(commands) == len(STEPS)
    words = shlex.split(commands["step"])
    assert words[:3] == [sys.executable, "-m", "pytest"]
    assert words[-2:] == ["-k", "R101 and bf16"]
    assert str(tmp_path / "step.json") in words
    assert shlex.split(commands["learning-r18"])[3:6] == ["camvid", "--root", "cam vid"]
    assert all("{" not in command for command in commands.values())


def test_a_misspelt_step_is_an_error_and_so_is_a_machine_without_a_gpu(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no such step; there are tests, kernels, step"):
        gpu_round.main(["--output", str(tmp_path), "--steps", "serach"])
    monkeypatch.setattr(gpu_round.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no GPU here; --dry-run"):
        gpu_round.main(["--output", str(tmp_path)])
