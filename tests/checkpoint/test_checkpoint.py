"""Checkpoint files are read without running code, and errors name a damaged or hostile file."""

import os
import pickle
import sys
import zipfile

import pytest
import torch
from torch import nn

from dfn_fast.checkpoint.archive import read_file, save_atomic
from dfn_fast.checkpoint.weights import save_weights
from dfn_fast.errors import CheckpointError


class RunsCode:
    """Creates its folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def flat(value):
    """A nested checkpoint as plain, comparable values."""
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("harm", ["bit", "zeros"])
def test_damage_anywhere_is_named_or_harmless(tmp_path, harm):
    """Flips a bit of every 37th byte, or zeroes each run of 64 bytes: in tensors, pickle and the archive's tables."""
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
    assert named > 0.6 * len(places)  # the rest is padding, or stored twice in the archive


def test_a_changed_tensor_is_named_and_plain_torch_load_would_not_have_seen_it(tmp_path):
    path = tmp_path / "run.pth"
    save_atomic({"format": 1, "model": {"weight": torch.zeros(1000)}}, path)
    data = bytearray(path.read_bytes())
    data[data.index(bytes(3000)) + 1500] = 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["model"]["weight"].any()
    with pytest.raises(CheckpointError, match=r"run\.pth: this checkpoint is damaged \(the checksum of .*data/0'"):
        read_file(path)


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


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_larger_than_the_memory_is_not_read(tmp_path, suffix):
    path = tmp_path / f"huge{suffix}"
    with path.open("wb") as file:
        file.truncate(1 << 43)  # without taking space
    with pytest.raises(CheckpointError, match=rf"huge\{suffix}: this checkpoint has 8796093022208 bytes, exp"):
        read_file(path)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_never_ends_is_not_read(tmp_path, suffix):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    for name, kind in (("pipe", "pipe"), ("zero", "device")):
        with pytest.raises(CheckpointError, match=rf"{name}\{suffix}: expected a regular file, got a {kind}"):
            read_file(tmp_path / f"{name}{suffix}")
