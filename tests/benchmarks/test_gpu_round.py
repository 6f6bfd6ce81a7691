"""The round on a GPU: order, limits, what is kept of a step that is stopped, what is left for the next call."""

import json
import shlex
import sys

import pytest

from benchmarks import gpu_round
from benchmarks.gpu_round import STEPS, Step
from dfn_fast.errors import ConfigError

SLEEP = 'python -c "import time; print(1, flush=True); time.sleep(60)"'


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


def test_a_step_is_stopped_at_its_limit_and_the_next_one_begins(tmp_path, results):
    done, left = go(tmp_path, Step("slow", 0.01, "", SLEEP, limit=0.05), Step("next", 0.01, "", 'python -c "print(2)"'))
    assert [(found["stopped"], found["last_line"]) for found in done] == [(True, "KeyboardInterrupt"), (False, "2")]
    assert left == []


def test_a_step_that_does_not_listen_is_killed(tmp_path, results, monkeypatch):
    monkeypatch.setattr(gpu_round, "GRACE", 0.5)
    deaf = SLEEP.replace("import time;", "import signal, time; signal.signal(2, signal.SIG_IGN);")
    ((found,), _) = go(tmp_path, Step("deaf", 0.01, "", deaf, limit=0.03))
    assert found["stopped"]
    assert found["exit_code"] == -9


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
