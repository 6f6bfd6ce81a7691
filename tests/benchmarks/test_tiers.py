"""A short benchmark run: what it leaves out, what it keeps of each suite, and that it reports this."""

import pytest

from benchmarks.harness.measure import DEVICE

SUITES = {"test_operators", "test_convolutions", "test_training_step", "test_inference", "test_data", "test_startup"}
COMPARING = {"test_operators", "test_training_step", "test_inference"}


class Collected:
    """A plugin that keeps the items of a run."""

    def __init__(self):
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session):
        self.items = session.items


def collected(*options):
    """The chosen cases of ``pytest benchmarks``."""
    plugin = Collected()
    arguments = ["benchmarks", "--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options]
    assert pytest.main(arguments, plugins=[plugin]) == 0
    return plugin.items


@pytest.fixture(scope="module")
def runs():
    """A short run's cases and header, and a full one's."""
    if DEVICE.type == "cuda":
        pytest.skip("a GPU runs all cases")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        return collected(), collected("--full")


def suite_of(item):
    return item.path.stem


def trial_of(item):
    """What is measured, without the implementation that measures it."""
    words = {name: value for name, value in item.callspec.params.items() if name != "implementation"}
    return item.originalname, str(words)


def test_a_short_run_has_cases_of_every_suite(runs):
    short, full = runs
    assert {suite_of(item) for item in short} == {suite_of(item) for item in full} == SUITES
    names = {item.nodeid for item in full}
    assert {item.nodeid for item in short} < names


def test_a_short_run_compares_eager_compile_and_ours(runs):
    for suite in COMPARING:
        found = {item.callspec.params["implementation"] for item in runs[0] if suite_of(item) == suite}
        assert found >= {"eager", "compile", "ours"}, suite


def test_a_short_run_takes_a_trial_whole(runs):
    """So that recording it loses no row of an earlier full run."""
    short, full = ([trial_of(item) for item in items if suite_of(item) in COMPARING] for items in runs)
    assert {trial: short.count(trial) for trial in short} == {trial: full.count(trial) for trial in short}


def test_the_header_counts_what_is_left_out(runs, monkeypatch, capfd):
    short, full = (len(items) for items in runs)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    collected()
    line = f"a short run: {full - short} of {full} cases are left out; --full runs them"
    assert line in capfd.readouterr().out
    collected("-k", "test_normalize")  # what -k leaves out is not counted
    assert "short run" not in capfd.readouterr().out
