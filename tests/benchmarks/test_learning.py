"""The learning comparison: rows of a finished run, the same recipe for both runs, the table and the picture."""

import json

import pytest
import torch

from benchmarks import learning
from benchmarks.reporting import plots
from benchmarks.reporting.tables import learning_table
from dfn_fast.config import TrainConfig
from dfn_fast.errors import UserError
from dfn_fast.train.folder import RunFolder


def finished(folder: RunFolder) -> None:
    """As a run of three epochs leaves it."""
    folder.start(TrainConfig(recipe="camvid", data="camvid", root="CamVid", backbone="resnet18", batch_size=2))
    for epoch in (1, 2, 3):
        folder.log({"kind": "train", "epoch": epoch, "iteration": epoch, "loss": 1.0})
        measured = {"seconds": 10.0 * epoch, "mean_iou": 0.1 * epoch}
        folder.log({"kind": "val", "epoch": epoch, "iteration": epoch, **measured})
    summary = {"best_mean_iou": 0.31, "seconds": 30.0, "images_per_second": 4.0, "peak_memory_bytes": None}
    folder.write_summary(summary | {"execution": {"amp": "bf16", "compile": True}})


@pytest.fixture
def calls(monkeypatch):
    """The command lines that would have run."""
    made: list[list[str]] = []

    def call(module, *words):
        made.append([module, *words])
        if module == "train":
            finished(RunFolder(words[2]))
        else:
            scores = words[words.index("--json") + 1]
            learning.Path(scores).write_text(json.dumps({"mean_iou": 0.4 if "--flip" in words else 0.3}))

    monkeypatch.setattr(learning, "call", call)
    return made


def test_both_runs_are_the_same_but_for_the_network(calls, tmp_path):
    theirs, ours = learning.learn("camvid", ["--root", "CamVid", "--seed", "1"], tmp_path)
    trained = [words for words in calls if words[0] == "train"]
    assert [words[-4:] for words in trained] == [["--root", "CamVid", "--seed", "1"]] * 2
    name = "compile" if torch.cuda.is_available() else "eager"
    assert trained[0][4:7] == ["--model", "reference", "--compile" if name == "compile" else "--no-compile"]
    assert trained[1][4:6] == ["--model", "fast"]
    assert theirs == ours | {"implementation": name}
    assert ours["group"] == "camvid DFN-R18 3 epochs"
    assert (ours["mean_iou"], ours["mean_iou_five_scales"]) == (0.3, 0.4)
    assert ours["curve"] == [[1, 10.0, 0.1], [2, 20.0, 0.2], [3, 30.0, 0.3]]
    assert list(tmp_path.iterdir()) == []  # checkpoints are large


def test_a_run_that_fails_is_named():
    with pytest.raises(UserError, match=r"python -m dfn_fast\.evaluate ended with exit code 2"):
        learning.call("evaluate", "no-such-file.pth")


def test_the_table_and_the_picture(calls, tmp_path):
    rows = learning.learn("camvid", [], tmp_path / "runs")
    rows[1]["images_per_s"] = 6.0
    lines = learning_table(rows)
    assert (
        lines[2]
        == f"| camvid DFN-R18 3 epochs, {rows[0]['implementation']} | 0.300 | 0.400 | 0.310 | 30 | 4.0 | 1.50 x |"
    )
    assert lines[3] == "| camvid DFN-R18 3 epochs, ours | 0.300 | 0.400 | 0.310 | 30 | 6.0 | - |"
    assert plots.draw({"learning": rows}, tmp_path, {}) == [tmp_path / "learning.png"]
