"""The comparison of two revisions: arithmetic, order and clean-up."""

import subprocess

import pytest

from benchmarks import compare
from dfn_fast.errors import ConfigError


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two commits, of which each holds its own number."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q", "-b", "main")
    for number in ("1", "2"):
        (tmp_path / "number").write_text(number)
        git("add", ".")
        git("commit", "-q", "-m", number)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    return tmp_path


def test_both_revisions_run_in_turns_and_nothing_stays(repository, monkeypatch, capsys):
    runs = []

    def run(tree, suites, keyword):
        number = (tree / "number").read_text()
        runs.append(number)
        return {"b.py::same": 1.0, "b.py::slower": {"1": 1.0, "2": 1.5}[number], f"only {number}": 1.0}

    monkeypatch.setattr(compare, "run", run)
    assert compare.main(["HEAD~1", "HEAD", "--rounds", "2"]) == 0
    assert runs == ["1", "2", "2", "1"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["slower", "same"]
    assert lines[1].split()[1:] == ["1.500", "1.500", "1.500", "slower"]
    listed = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 1


def test_a_direction_is_claimed_where_every_round_agrees():
    base, head = [{"x": 1.0, "y": 1.0}] * 3, [{"x": 0.8, "y": 0.9}, {"x": 0.9, "y": 1.1}, {"x": 0.7, "y": 0.9}]
    lines = compare.table(compare.ratios(base, head)).splitlines()
    assert lines[1].split() == ["y", "0.900", "0.900", "1.100"]
    assert lines[2].split() == ["x", "0.800", "0.700", "0.900", "faster"]


def test_errors_say_what_to_do(repository, monkeypatch):
    with pytest.raises(ConfigError, match="nowhere: git cannot check it out"):
        compare.main(["nowhere", "HEAD"])
    with pytest.raises(ConfigError, match="expected 1 or more"):
        compare.main(["HEAD", "HEAD", "--rounds", "0"])
    monkeypatch.setattr(compare, "run", lambda tree, *rest: {tree.name: 1.0})
    with pytest.raises(ConfigError, match="no benchmark in common"):
        compare.main(["HEAD~1", "HEAD"])
