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

from dfn_fast.checkpoint.archive import read_file, save_atomic
from dfn_fast.checkpoint.weights import save_weights
from dfn_fast.data.datasets.camvid import CamVidDataset
from dfn_fast.data.datasets.cityscapes import CityscapesDataset
from dfn_fast.data.datasets.voc import VocDataset
from dfn_fast.errors import CheckpointError
from dfn_fast.inference.loading import load_model
from dfn_fast.network.arguments import infer_arguments
from dfn_fast.network.reference import ReferenceDFN

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.parametrize(
    "value",
    [np.float64(0.5), np.zeros(3), {"deep": [object()]}, torch.nn.Linear(1, 1)],
    ids=["number", "array", "deep", "module"],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, value):
    path = tmp_path / "run.pth"
    save_atomic({"iteration": 1}, path)
    with pytest.raises(CheckpointError, match=r"run\.pth: content\['extra'\].* is a .*could not be read back"):
        save_atomic({"iteration": 2, "extra": value}, path)
    assert read_file(path) == {"iteration": 1}


DISK_FULL = """
import resource, sys, torch
from dfn_fast.checkpoint.archive import save_atomic
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


def flat(value):
    """A nested checkpoint as plain, comparable values."""
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("harm", ["bit", "zeros"])
def test_damage_anywhere_is_named_or_harmless(tmp_path, harm):
    """A bit of each 37th byte of the file, in tensors, pickle and the archive's own tables; 64 zeros in each 64th."""
    content = {"model": {name: torch.randn(40, 7) for name in "abc"}, "position": {"iteration": 7, "loss": 0.25}}
    path = tmp_path / "run.pth"
    save_atomic(content, path)
    whole, expected, named = path.read_bytes(), flat(content), 0
    places = range(4, len(whole), 37 if harm == "bit" else 64)
    for i in places:
        data = bytearray(whole)
        if harm == "bit":
            data[i] ^= 1 << (i % 8)
        else:
            data[i : i + 64] = bytes(min(64, len(data) - i))
        path.write_bytes(data)
        try:
            assert flat(read_file(path)) == expected, i
        except CheckpointError as error:
            named += str(error).startswith(f"{path}: ")
    assert named > 0.6 * len(places)  # the rest is padding, and what the archive says twice


def test_a_changed_tensor_is_named_and_plain_torch_load_would_not_have_seen_it(tmp_path):
    path = tmp_path / "run.pth"
    save_atomic({"format": 1, "model": {"weight": torch.zeros(1000)}}, path)
    data = bytearray(path.read_bytes())
    data[data.index(bytes(3000)) + 1500] = 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["model"]["weight"].any()
    with pytest.raises(CheckpointError, match=r"run\.pth: this checkpoint is damaged \(the checksum of .*data/0'"):
        read_file(path)


def test_ours_have_checksums_and_others_need_none(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        save_atomic({"weight": torch.ones(9)}, tmp_path / "ours.pth")
        torch.save({"weight": torch.ones(9)}, tmp_path / "others.pth")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    for name, has in (("ours.pth", True), ("others.pth", False)):
        with zipfile.ZipFile(tmp_path / name) as archive:
            assert any(record.CRC for record in archive.infolist()) == has
        assert torch.equal(read_file(tmp_path / name)["weight"], torch.ones(9))


def test_what_had_the_name_before_is_kept(tmp_path):
    for iteration in range(3):
        save_atomic({"iteration": iteration}, tmp_path / "last.pth", tmp_path / "previous.pth")
    assert read_file(tmp_path / "last.pth") == {"iteration": 2}
    assert read_file(tmp_path / "previous.pth") == {"iteration": 1}
    assert sorted(os.listdir(tmp_path)) == ["last.pth", "previous.pth"]


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
            inferred = infer_arguments(ReferenceDFN(**config).state_dict())
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
        infer_arguments(change(state), "my file")


# Hostile content


def expanded(shape, dtype=torch.float32):
    """One number in the file, and any number of them in memory once they are asked for."""
    return torch.zeros((), dtype=dtype).expand(shape)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"channels": 10**9}, "builds no network|parameters, but its weights have"),
        ({"channels": 10**5}, r"asks for a network of \d+ parameters, but its weights have 16384 bytes"),
        ({"num_classes": 10**6}, "asks for a network of|builds no network"),
        ({"channels": 1024}, r"asks for a network of \d+ parameters, but its weights have 16384 bytes"),
        ({"channels": 10**30}, "channels is 1000"),
        ({"channels": True}, "channels is True"),
        ({"channels": -1}, "channels is -1"),
        ({"channels": 1.5}, r"channels is 1\.5"),
        ({"border": "yes"}, "border is 'yes'"),
        ({"backbone": ["resnet18"]}, r"backbone is \['resnet18'\]"),
        ({"stem": "s" * 10**6}, "stem is 's"),
        ({7: 1}, "unknown argument 7"),
        ({"pretrained_model": "resnet18"}, "unknown argument 'pretrained_model'"),
        ({"norm_layer": None}, "unknown argument 'norm_layer'"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("stretched", [False, True])
def test_a_network_that_a_file_asks_for_is_checked_before_it_is_built(tmp_path, monkeypatch, changes, text, stretched):
    settings = {"num_classes": 4, **SMALL, "stem": "deep", **changes}
    state = {"smooth_pre_rrbs.0.conv_1x1.weight": torch.zeros(8, 512, 1, 1)}
    if stretched:
        state = {name: expanded(tensor.shape) for name, tensor in state.items()}
        text = f"values that are not in the file|{text}"
    save_atomic({"format": 1, "model": state, "model_config": settings}, tmp_path / "a.pth")
    built = watch_networks(monkeypatch)
    with pytest.raises(CheckpointError, match=rf"a\.pth: .*({text})") as caught:
        load_model(tmp_path / "a.pth")
    assert len(str(caught.value)) < 1000
    assert not built


def watch_networks(monkeypatch):
    """The list of networks that are built from now on, but for those without memory."""
    built = []
    init = ReferenceDFN.__init__

    def noted(self, *args, **settings):
        if torch.get_default_device().type != "meta":
            built.append(settings)
        init(self, *args, **settings)

    monkeypatch.setattr(ReferenceDFN, "__init__", noted)
    return built


@pytest.mark.parametrize(
    "tensor",
    [
        expanded((8, 512, 1, 1)),
        torch.empty(8, 512, 1, 1, device="meta"),
        torch.zeros(8, 512, 1, 1).to_sparse(),
        torch.zeros(8, 512, 1, 1).to(torch.float8_e4m3fn),
        torch.zeros(8, 512, 1, 1, dtype=torch.complex64),
    ],
    ids=["stretched", "meta", "sparse", "8 bits", "complex"],
)
def test_tensors_that_are_not_numbers_in_the_file_are_refused(tmp_path, tensor):
    state = small_dfn().state_dict()
    state["smooth_pre_rrbs.0.conv_1x1.weight"] = tensor
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: .*smooth_pre_rrbs\.0|a\.pth: this .* has code in it"):
        load_model(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": 4},
        {"classes": [1, 2, 3, 4]},
        {"palette": "red"},
        {"palette": [[0, 0, 256]] * 4},
        {"palette": [[0, 0]] * 4},
        {"palette": [1, 2, 3, 4]},
        {"dataset": ["voc"]},
        {"config": [1]},
        {"config": {"border_width": "wide"}},
        {"format": torch.zeros(3)},
        {"model_config": None},
        {"model_config": 3},
    ],
    ids=str,
)
def test_wrong_types_beside_the_weights_are_named(tmp_path, small_checkpoint, changes):
    torch.save({**small_checkpoint, **changes}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: "):
        load_model(tmp_path / "a.pth")


@pytest.fixture(scope="module")
def small_checkpoint():
    return training_checkpoint(small_dfn())


def test_a_dictionary_that_holds_itself_ends(tmp_path):
    content = {}
    content["model"] = content
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: expected a state dict"):
        load_model(tmp_path / "a.pth")


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save({"weight": torch.zeros(1 << 20)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert path.stat().st_size < 1 << 16
    with pytest.raises(CheckpointError, match=r"bomb\.pth: this checkpoint would unpack to 41\d{5} bytes"):
        read_file(path)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_never_ends_is_not_read(tmp_path, suffix):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    for name, kind in (("pipe", "pipe"), ("zero", "device")):
        with pytest.raises(CheckpointError, match=rf"{name}\{suffix}: expected a regular file, got a {kind}"):
            read_file(tmp_path / f"{name}{suffix}")
