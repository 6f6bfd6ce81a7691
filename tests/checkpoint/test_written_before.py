"""Files of the revision before ``dfn_fast`` had rooms: a run resumes, a checkpoint and a saved folder load.

``written_before/README.md`` says how they were made. The bounds leave room for another processor's rounding.
"""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import safetensors.torch
import torch
from torch import nn

from dfn_fast import FastDFN, ReferenceDFN, load_model
from dfn_fast.checkpoint.archive import read_file
from dfn_fast.network.backbone import LAYERS, BasicBlock, ResNet, initialise, make_stage
from dfn_fast.train.__main__ import main
from dfn_fast.train.folder import RunFolder
from support.runs import write_blobs

WRITTEN = Path(__file__).with_name("written_before")


class NarrowResNet(ResNet):
    """Four channels and only two non-empty stages, to keep the files small."""

    def __init__(self, depth, stem, norm_layer):
        nn.Module.__init__(self)
        self.depth, self.stem, self.channels = depth, stem, (4, 4, 4, 4)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False), norm_layer(4)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2 = (make_stage(BasicBlock, 4, 4, 1, stride, norm_layer) for stride in (1, 2))
        self.layer3, self.layer4 = nn.Sequential(), nn.Sequential()
        initialise(self)


@pytest.fixture(autouse=True)
def narrow_networks():
    with (
        # With AVX2 alone, oneDNN's weight gradient of a 1x1 convolution of stride 2 with fewer than eight channels in
        # channels_last is wrong and writes past its memory (PyTorch 2.13, 2.14.1). No published network has such a one.
        torch.backends.mkldnn.flags(enabled=False),
        patch("dfn_fast.network.reference.ResNet", NarrowResNet),
        patch.dict(LAYERS, resnet18=(BasicBlock, (1, 1, 0, 0))),
    ):
        yield


@pytest.fixture(scope="module")
def written_log_probabilities():
    return safetensors.torch.load_file(WRITTEN / "log_probabilities.safetensors")


@torch.no_grad()
def log_probabilities(model):
    """Log-probabilities at every second pixel of a computed image."""
    return model(torch.linspace(-40, 40, 3 * 40 * 33).sin().view(1, 3, 40, 33))[..., ::2, ::2]


def records(lines):
    return [json.loads(line) for line in lines.splitlines()]


def test_a_stopped_run_resumes_and_ends_as_it_would_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the run's paths are relative
    write_blobs(tmp_path / "photos", 9, 2, step=3)
    shutil.copytree(WRITTEN / "run", tmp_path / "run")
    run = RunFolder("run")
    assert read_file(run.last)["position"]["iteration"] == 5
    written = run.metrics()
    with patch("dfn_fast.train.__main__.draw"):
        assert main(["--resume", "--output-dir", "run"]) == 0

    names = ["best.pth", "config.json", "last.pth", "metrics.jsonl", "previous.pth", "summary.json"]
    assert sorted(path.name for path in run.path.iterdir()) == names
    assert run.config_file.read_bytes() == (WRITTEN / "run" / "config.json").read_bytes()
    ours, expected = run.metrics(), records((WRITTEN / "undisturbed.jsonl").read_text())
    assert ours[:5] == written
    assert [record.keys() for record in ours] == [record.keys() for record in expected]
    for record, theirs in zip(ours, expected, strict=True):
        for name in ("kind", "epoch", "iteration", "skipped_steps"):
            assert record.get(name) == theirs.get(name)
        for name in {"loss", "lr", "train_loss"} & record.keys():
            assert record[name] == pytest.approx(theirs[name], rel=1e-4), record
        if record["kind"] == "val":
            assert record["mean_iou"] == pytest.approx(theirs["mean_iou"], abs=0.01)

    last = read_file(run.last)
    position = last["position"]
    assert (position["iteration"], position["epoch"], position["step"]) == (12, 4, 0)
    weights = safetensors.torch.load_file(WRITTEN / "saved" / "model.safetensors")
    assert last["model"].keys() == weights.keys()
    for name, tensor in last["model"].items():
        scale = weights[name].abs().max().item()
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-4 * scale, msg=name)


def test_a_best_checkpoint_loads(written_log_probabilities):
    loaded = load_model(WRITTEN / "best.pth")
    assert loaded.classes == ("ground", "blob")
    assert loaded.palette.tolist() == [[0, 0, 0], [128, 0, 0]]
    assert (loaded.dataset, loaded.border_width) == ("folder", 5)
    assert not loaded.mismatch
    torch.testing.assert_close(log_probabilities(loaded.model), written_log_probabilities["best"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", [FastDFN, ReferenceDFN])
def test_a_saved_folder_loads(network, written_log_probabilities):
    model = network.from_pretrained(WRITTEN / "saved")
    assert model.alpha == 0.1
    torch.testing.assert_close(log_probabilities(model), written_log_probabilities["saved"], rtol=1e-4, atol=1e-4)
