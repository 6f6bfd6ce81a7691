"""A run continues only with the configuration, the data and the finite numbers of the run before it."""

import argparse
import dataclasses
import json
import os
import sys

import pytest
import torch

from dfn_fast.checkpoint.archive import read_file
from dfn_fast.config import TrainConfig, recipe
from dfn_fast.errors import CheckpointError, ConfigError, DataError
from dfn_fast.train.folder import RunFolder
from dfn_fast.train.options import RESUMABLE, resumed_config
from dfn_fast.train.resume import require_finite, require_same_config
from dfn_fast.train.run import Run
from support.networks import narrow_resnet
from support.runs import differences, timeless_metrics

# A value for each field that is neither the default of `camvid` nor refused beside the others.
OTHER = {
    "recipe": "voc",
    "data": "voc",
    "train_split": "trainval",
    "val_split": "test",
    "num_classes": 3,
    "classes": "classes.txt",
    "ignore_value": 9,
    "label_offset": -1,
    "crop": (64, 64),
    "scales": (1.0,),
    "flip": False,
    "border_width": 3,
    "model": "reference",
    "backbone": "resnet18",
    "stem": "conv7",
    "channels": 8,
    "border_channels": 8,
    "global_context": False,
    "channel_attention": False,
    "deep_supervision": False,
    "border": False,
    "pretrained": "resnet101s",
    "weights": "dfn.pth",
    "strict": False,
    "border_weight": 1.0,
    "focal_alpha": 0.5,
    "focal_gamma": 1.0,
    "focal": "torchseg",
    "epochs": 3,
    "iterations": 5,
    "batch_size": 4,
    "accumulate": 2,
    "lr": 0.5,
    "new_layer_lr": 2.0,
    "power": 1.0,
    "momentum": 0.5,
    "weight_decay": 0.5,
    "decay_norm_and_bias": False,
    "amp": "off",
    "channels_last": False,
    "compile": True,
    "deterministic": True,
    "seed": 1,
}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(TrainConfig) if f.name not in RESUMABLE])
def test_every_field_that_decides_the_result_is_compared_with_the_checkpoint(name, tmp_path):
    saved = recipe("camvid")
    content = {"config": saved.to_dict()}
    require_same_config(saved, content, tmp_path / "last.pth", tmp_path / "config.json")
    changed = dataclasses.replace(saved, **{name: OTHER[name]})
    with pytest.raises(ConfigError, match=rf"config\.json: {name} is .*last\.pth was written with") as error:
        require_same_config(changed, content, tmp_path / "last.pth", tmp_path / "config.json")
    for config in (saved, changed):
        assert repr(getattr(config, name)) in str(error.value)


NOTHING = {"recipe": None, "preset": None, "config": None}


@pytest.mark.parametrize("name", OTHER)
def test_every_option_that_decides_the_result_is_refused(name):
    saved = recipe("camvid")
    given = argparse.Namespace(**{**NOTHING, name: OTHER[name]})
    with pytest.raises(ConfigError, match=r"is of recipe 'camvid', not 'voc'|differs from the run that --resume cont"):
        resumed_config(saved, given)
    assert resumed_config(saved, argparse.Namespace(**{**NOTHING, name: getattr(saved, name)})) == saved


def test_a_changed_configuration_is_not_continued(tiny):
    run = tiny("run", "--stop-after", "4")
    before, config = run.last.read_bytes(), json.loads(run.config_file.read_text())
    run.config_file.write_text(json.dumps({**config, "iterations": 3}))
    with pytest.raises(ConfigError, match=r"config\.json: iterations is 3, but .*last\.pth was written with None"):
        tiny("run", "--resume")
    assert run.last.read_bytes() == before
    run.config_file.write_text(json.dumps({**config, "log_every": 2}))
    tiny("run", "--resume", "--stop-after", "5")


def rename(folder, split, old, new):
    for kind in ("images", "masks"):
        (folder / split / kind / f"{old}.png").rename(folder / split / kind / f"{new}.png")


def remove(folder, split, name):
    for kind in ("images", "masks"):
        (folder / split / kind / f"{name}.png").unlink()


def rename_class(folder):
    (folder / "classes.txt").write_text("ground\nrock\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: remove(folder, "train", "04"),
            r"split 'train' of .* had 9 images and now has 8 \(without 04",
        ),
        (lambda folder: rename(folder, "train", "04", "x"), r"had 9 .* now has 9 \(without 04; with the new x\)"),
        (lambda folder: remove(folder, "val", "01"), r"split 'val' of .* had 2 images and now has 1"),
        (rename_class, r"classes 'ground', 'blob', but the data set now has 'ground', 'rock'"),
    ],
    ids=["fewer images", "another name", "fewer for validation", "another class"],
)
def test_other_data_is_not_continued(tiny, own_photos, change, message):
    run = tiny("run", "--root", str(own_photos), "--stop-after", "1")
    change(own_photos)
    with pytest.raises(DataError, match=r"last\.pth: (.|\n)*" + message + r".*; restore the data set"):
        tiny("run", "--resume")
    assert read_file(run.last)["position"]["iteration"] == 1


def test_data_that_moved_is_continued(tiny, own_photos, tmp_path):
    tiny("run", "--root", str(own_photos), "--stop-after", "1")
    own_photos.rename(tmp_path / "elsewhere")
    tiny("run", "--resume", "--root", str(tmp_path / "elsewhere"), "--stop-after", "2")


def test_a_checkpoint_of_an_earlier_version_continues_with_a_note(tiny, own_photos, capsys):
    run = tiny("run", "--root", str(own_photos), "--stop-after", "1")
    content = read_file(run.last)
    del content["data"]
    torch.save(content, run.last)
    tiny("run", "--resume", "--stop-after", "2")
    assert "is of an earlier version and does not say which images" in capsys.readouterr().err
    content = read_file(run.last)
    del content["data"]
    torch.save(content, run.last)
    for name in ("02", "03", "04"):
        remove(own_photos, "train", name)
    content["position"] |= {"epoch": 1, "step": 1, "iteration": 4}
    torch.save(content, run.last)
    with pytest.raises(DataError, match=r"at iteration 4, epoch 1, step 1, but an epoch of this data set has 2 steps"):
        tiny("run", "--resume")


def test_a_run_continues_without_the_files_of_its_first_weights(tiny, tmp_path, monkeypatch):
    torch.save(narrow_resnet("resnet18", "deep", torch.nn.BatchNorm2d).state_dict(), tmp_path / "resnet.pth")
    other = tiny("other", "--stop-after", "1")
    for name, option, file in (("a", "--pretrained", tmp_path / "resnet.pth"), ("b", "--weights", other.last)):
        run = tiny(name, option, str(file), "--stop-after", "1")
        file.unlink()
        assert tiny(name, "--resume", "--stop-after", "2").last == run.last
        assert read_file(run.last)["config"][option[2:]] == str(file)
        with pytest.raises(CheckpointError, match="does not exist"):
            tiny(f"new {name}", option, str(file))


def test_weights_for_every_tensor_leave_pretrained_ones_unread(tiny, capsys):
    first = tiny("first", "--stop-after", "1")
    tiny("second", "--pretrained", "gone.pth", "--weights", str(first.last), "--stop-after", "1")
    assert f"--pretrained gone.pth is not read: --weights {first.last}" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"gone\.pth"):
        tiny("third", "--pretrained", "gone.pth", "--weights", str(first.last), "--no-strict")


@pytest.mark.parametrize(
    ("number", "message"),
    [("0", "--stop-after must be at least 1"), ("2", "-after 2: .* at iteration 2 already")],
)
def test_an_iteration_that_has_passed_is_not_stopped_at(tiny, number, message):
    run = tiny("run", "--stop-after", "2")
    before = run.last.read_bytes()
    with pytest.raises(ConfigError, match=message):
        tiny("run", "--resume", "--stop-after", number)
    assert run.last.read_bytes() == before


def test_a_run_that_accumulates_continues_within_an_epoch(tiny):
    words = ("--batch-size", "2", "--accumulate", "2")  # two steps of two passes in each epoch
    straight = tiny("straight", *words)
    tiny("halves", *words, "--stop-after", "3")
    assert read_file(RunFolder(straight.path.with_name("halves")).last)["position"]["step"] == 1
    halves = tiny("halves", "--resume")
    assert differences(read_file(straight.last), read_file(halves.last)) == []
    assert timeless_metrics(straight) == timeless_metrics(halves)


def test_another_number_of_threads_is_noted(tiny, capsys):
    run = tiny("run", "--stop-after", "1")
    tiny("run", "--resume", "--stop-after", "2")
    assert "last bits" not in capsys.readouterr().err
    content = read_file(run.last)
    assert content["machine"]["device"] == f"cpu, {torch.get_num_threads()} threads"
    content["machine"]["device"] = "cpu, 99 threads"
    torch.save(content, run.last)
    tiny("run", "--resume", "--stop-after", "3")
    told = capsys.readouterr().err
    assert f"was written with device 'cpu, 99 threads', now 'cpu, {torch.get_num_threads()} threads': the numb" in told
    assert "processes" not in told


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
def test_a_run_looks_at_its_folder_and_locks_it(tiny, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "metrics.jsonl")
    with pytest.raises(ConfigError, match=r"holds a run already \(metrics\.jsonl\)"):
        tiny("run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    holders = []
    monkeypatch.setattr(Run, "show", lambda self, *_: holders.append(self.folder.lock_file.read_text()))
    run = tiny("run", "--stop-after", "1")
    tiny("run", "--resume", "--stop-after", "2")
    assert [holder.split(" on ")[0] for holder in holders] == [f"process {os.getpid()}"] * 2
    assert not run.lock_file.exists()
    run.metrics_file.unlink()
    os.mkfifo(run.metrics_file)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: expected a regular file, got a pipe"):
        tiny("run", "--resume")


@pytest.mark.parametrize("part", ["weight", "momentum", "beyond float32"])
def test_a_checkpoint_that_is_not_finite_is_refused(tiny, part):
    run = tiny("run", "--stop-after", "2")
    content = read_file(run.last)
    require_finite(content, run.last)
    if part == "momentum":
        content["optimizer"]["state"][0]["momentum_buffer"][0] = -torch.inf
    elif part == "weight":
        content["model"]["backbone.bn1.weight"][0] = torch.nan
    else:
        content["model"]["backbone.bn1.weight"] = content["model"]["backbone.bn1.weight"].double() * 1e300
    torch.save(content, run.last)
    with pytest.raises(CheckpointError, match=r"last\.pth: 1 tensors hold nan or infinity: .*previous\.pth"):
        tiny("run", "--resume")
