"""Checkpoint files: written whole or not at all, read without running code, and built into the network they hold."""

import errno
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dfn_fast.checkpoint import read_file, save_atomic, save_weights
from dfn_fast.data.camvid import CamVidDataset
from dfn_fast.data.cityscapes import CityscapesDataset
from dfn_fast.data.voc import VocDataset
from dfn_fast.errors import CheckpointError
from dfn_fast.loading import infer_model_config, load_model
from dfn_fast.reference import ReferenceDFN

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"backbone": "resnet18", "channels": 8, "border_channels": 5}


class RunsCode:
    """Unpickled, it makes the folder that it names."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def small_dfn(num_classes=4, **settings):
    """A small network whose norm layers and biases are not as initialisation leaves them."""
    torch.manual_seed(num_classes)
    model = ReferenceDFN(num_classes, **{**SMALL, **settings})
    for tensor in model.state_dict().values():
        if tensor.ndim < 2:
            tensor.copy_(torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else torch.tensor(7))
    return model


def training_checkpoint(model, num_classes=4, **changes):
    return {
        "format": 1,
        "model": model.state_dict(),
        "model_config": {"num_classes": num_classes, **SMALL, "stem": "deep"},
        "classes": [f"thing {i}" for i in range(num_classes)],
        "palette": [[i, 2 * i, 255 - i] for i in range(num_classes)],
        "dataset": "synthetic",
        **changes,
    }


def assert_same_weights(model, state):
    ours = model.state_dict()
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], state[name]) for name in ours)


# Writing


def test_what_is_saved_is_read_back(tmp_path):
    content = {
        "model": OrderedDict(a=torch.randn(3, 4), b=torch.tensor(7)),
        "optimizer": {"state": {0: {"momentum_buffer": torch.randn(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "random": ["MT19937", (3, None), torch.get_rng_state()],
        "flag": True,
    }
    save_atomic(content, tmp_path / "run.pth")
    back = read_file(tmp_path / "run.pth")
    assert all(torch.equal(back["model"][name], content["model"][name]) for name in "ab")
    assert back["optimizer"]["param_groups"] == content["optimizer"]["param_groups"]
    assert back["random"][:2] == ["MT19937", (3, None)]
    assert os.listdir(tmp_path) == ["run.pth"]


@pytest.mark.parametrize("value", [np.float64(0.5), np.zeros(3), {"deep": [object()]}, torch.nn.Linear(1, 1)], ids=repr)
def test_what_could_not_be_read_back_is_not_written(tmp_path, value):
    path = tmp_path / "run.pth"
    save_atomic({"iteration": 1}, path)
    with pytest.raises(CheckpointError, match=r"run\.pth: content\['extra'\].* is a .*could not be read back"):
        save_atomic({"iteration": 2, "extra": value}, path)
    assert read_file(path) == {"iteration": 1}


DISK_FULL = """
import resource, sys, torch
from dfn_fast.checkpoint import save_atomic
from dfn_fast.errors import CheckpointError
save_atomic({"iteration": 1}, sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    save_atomic({"iteration": 2, "weights": [torch.zeros(500, 50) for _ in range(4)]}, sys.argv[1])
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the limit on a file's size is POSIX")
@pytest.mark.parametrize("room", [150_000, 400_500], ids=["in a tensor", "in the last bytes"])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, room):
    path = tmp_path / "run.pth"
    command = [sys.executable, "-c", DISK_FULL, path, str(room)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path}: could not be written ([Errno {errno.EFBIG}]")
    assert read_file(path) == {"iteration": 1}
    assert os.listdir(tmp_path) == ["run.pth"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_failure_at_the_end_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, moment):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "run.pth"
    save_atomic({"iteration": 1}, path)
    monkeypatch.setattr(os, moment, fail)
    with pytest.raises(CheckpointError, match=r"run\.pth: could not be written .*No space left"):
        save_atomic({"iteration": 2}, path)
    monkeypatch.undo()
    assert read_file(path) == {"iteration": 1}
    assert os.listdir(tmp_path) == ["run.pth"]


def test_an_interruption_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    def interrupt(content, file):
        file.write(b"half a check")
        raise KeyboardInterrupt

    path = tmp_path / "run.pth"
    save_atomic({"iteration": 1}, path)
    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_atomic({"iteration": 2}, path)
    assert read_file(path) == {"iteration": 1}
    assert os.listdir(tmp_path) == ["run.pth"]


def test_the_file_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    save_atomic({"iteration": 1}, tmp_path / "run.pth")
    assert calls == ["fsync", "replace", "fsync"]  # the last one: the folder's


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone/run\.pth: could not be written .*No such file or directory"):
        save_atomic({"iteration": 1}, tmp_path / "gone" / "run.pth")


# Reading


def test_missing_file_folder_and_empty_file_are_told_apart(tmp_path):
    (tmp_path / "empty.pth").touch()
    for name, text in (("none.pth", "does not exist"), ("", "got a folder"), ("empty.pth", r"is empty \(0 bytes\)")):
        with pytest.raises(CheckpointError, match=text):
            read_file(tmp_path / name)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.005, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_called_so(tmp_path, kind, share):
    model = nn.Linear(100, 50)
    path = tmp_path / ("whole.safetensors" if kind == "safetensors" else "whole.pth")
    if kind == "legacy":
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        save_weights(model, path)
    assert read_file(path).keys() == {"weight", "bias"}
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"whole\.\w+: this checkpoint is truncated or damaged"):
        read_file(path)


def test_a_damaged_pickle_inside_a_whole_archive_is_called_so(tmp_path):
    path = tmp_path / "run.pth"
    torch.save({"weight": torch.zeros(3)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data[:20] if name.endswith("data.pkl") else data)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_file(path)


@pytest.mark.parametrize("name", ["page.pth", "page.safetensors", "archive.pt"])
def test_what_is_no_checkpoint_is_called_so(tmp_path, name):
    path = tmp_path / name
    path.write_text("<!DOCTYPE html><title>Sign in</title>" * 10)
    if name == "archive.pt":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=f"{name}: this is not a checkpoint") as error:
        read_file(path)
    assert ("torch.save wrote" if path.suffix != ".safetensors" else "safetensors wrote") in str(error.value)


def test_a_checkpoint_must_be_a_dictionary(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"list\.pth: expected a dictionary of weights, got a list"):
        read_file(tmp_path / "list.pth")


@pytest.mark.filterwarnings("ignore:.*(torch.jit|TorchScript)")
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "script"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, kind):
    path, made = tmp_path / "evil.ckpt", tmp_path / "made"
    content = {"model": {"weight": torch.zeros(1)}, "extra": RunsCode(made)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"extra": RunsCode(made)}, protocol=2))
    elif kind == "script":
        torch.jit.save(torch.jit.trace(nn.ReLU(), torch.zeros(1)), path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"evil\.ckpt: this file has code in it") as error:
        read_file(path)
    assert not made.exists()
    assert "weights_only" not in str(error.value)
    assert "safetensors" in str(error.value)
    if kind != "script":
        assert "mkdir" in str(error.value)


# Networks from files


def test_our_checkpoint_gives_back_network_and_classes(tmp_path):
    model = small_dfn()
    save_atomic(training_checkpoint(model), tmp_path / "best.pth")
    loaded = load_model(tmp_path / "best.pth")
    assert_same_weights(loaded.model, model.state_dict())
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.classes == ("thing 0", "thing 1", "thing 2", "thing 3")
    assert loaded.palette.dtype == np.uint8
    assert loaded.palette.tolist() == [[0, 0, 255], [1, 2, 254], [2, 4, 253], [3, 6, 252]]
    assert loaded.dataset == "synthetic"
    assert loaded.model_config["num_classes"] == 4
    assert not loaded.mismatch


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bare_weights_give_the_same_network(tmp_path, suffix):
    model = small_dfn(stem="conv7", channel_attention=False)
    save_weights(model, tmp_path / f"dfn{suffix}")
    loaded = load_model(tmp_path / f"dfn{suffix}", channels_last=True)
    assert_same_weights(loaded.model, model.state_dict())
    assert loaded.model.smooth_aft_rrbs[0].cbr.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert loaded.dataset is None
    image = torch.randn(1, 3, 40, 52)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(image), model.eval()(image), rtol=1e-4, atol=1e-4)


def test_the_authors_checkpoint_loads(tmp_path):
    """The form of the authors' trainer: wrapped by DistributedDataParallel, below 'model', with the optimiser."""
    model = small_dfn()
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    path = tmp_path / "epoch-last.pth"
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 79, "iteration": 63200}, path)
    assert_same_weights(load_model(path).model, model.state_dict())


@pytest.mark.parametrize(
    ("num_classes", "known"), [(21, VocDataset), (19, CityscapesDataset), (11, CamVidDataset)], ids=["21", "19", "11"]
)
def test_foreign_weights_get_the_classes_that_fit_their_number(tmp_path, num_classes, known):
    save_weights(ReferenceDFN(num_classes, **SMALL), tmp_path / "dfn.pth")
    loaded = load_model(tmp_path / "dfn.pth", num_classes=num_classes)
    assert loaded.classes == known.classes
    np.testing.assert_array_equal(loaded.palette, known.palette)


def test_an_unknown_number_of_classes_gets_numbers_and_colours_of_its_own(tmp_path):
    save_weights(ReferenceDFN(40, **SMALL), tmp_path / "dfn.pth")
    loaded = load_model(tmp_path / "dfn.pth")
    assert loaded.classes == tuple(f"class {i}" for i in range(40))
    assert len({tuple(colour) for colour in loaded.palette.tolist()}) == 40


def test_another_class_count_than_needed_is_an_error_with_both(tmp_path):
    save_atomic(training_checkpoint(small_dfn()), tmp_path / "best.pth")
    with pytest.raises(CheckpointError, match=r"best\.pth: this network has 4 classes, but 21 are needed"):
        load_model(tmp_path / "best.pth", num_classes=21)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": 2}, "expected checkpoint format 1, got 2"),
        ({"model_config": {"num_classes": 4, "wings": 2}}, "builds no network .*wings"),
        ({"model_config": {"num_classes": 4, "backbone": "vgg16"}}, "builds no network .*vgg16"),
        ({"classes": ["a", "b", "c"]}, "expected names and colours of 4 classes, got 3 and 4"),
        ({"model_config": {"num_classes": 4, **SMALL, "channels": 9}}, r"wrong shape: .*\(model \[9, 512, 1, 1\]"),
    ],
)
def test_a_checkpoint_of_ours_that_does_not_hang_together_is_an_error(tmp_path, changes, text):
    save_atomic(training_checkpoint(small_dfn(), **changes), tmp_path / "best.pth")
    with pytest.raises(CheckpointError, match=rf"best\.pth.*{text}"):
        load_model(tmp_path / "best.pth")


def test_loading_leaves_the_callers_random_numbers_alone(tmp_path):
    save_weights(small_dfn(), tmp_path / "dfn.pth")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_model(tmp_path / "dfn.pth")
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
@pytest.mark.parametrize("stem", ["deep", "conv7"])
def test_configuration_is_inferred_from_names_and_shapes(backbone, stem):
    settings = {"backbone": backbone, "stem": stem, "channels": 24, "border_channels": 9}
    ablations = ("global_context", "channel_attention", "deep_supervision", "border")
    with torch.device("meta"):
        for off in (None, *ablations):
            config = {"num_classes": 13, **settings, **{name: name != off for name in ablations}}
            inferred = infer_model_config(ReferenceDFN(**config).state_dict())
            if off == "border":
                config["border_channels"] = 21  # nothing in the file tells, and nothing depends on it
            assert inferred == config


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: {n: t for n, t in s.items() if "layer3.1" not in n}, r"a backbone with \[2, 2, 1, 2\] BasicBlocks"),
        (lambda s: {n: t for n, t in s.items() if "heads" not in n}, r"there is no smooth_heads\.3\.conv\.weight"),
        (lambda s: {n[9:]: t for n, t in s.items() if n.startswith("backbone.")}, "weights of a ResNet, not of a DFN"),
    ],
    ids=["depth", "no head", "only a backbone"],
)
def test_a_configuration_that_cannot_be_inferred_is_an_error(change, text):
    with torch.device("meta"):
        state = ReferenceDFN(4, **SMALL).state_dict()
    with pytest.raises(CheckpointError, match=rf"my file: .*{text}"):
        infer_model_config(change(state), "my file")
