"""``save_pretrained`` and ``from_pretrained``: networks survive the round trip, and inconsistent files are refused."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from dfn_fast.checkpoint import folder as pretrained_folder
from dfn_fast.errors import CheckpointError, ConfigError
from dfn_fast.inference.loading import load_model
from dfn_fast.network.fast import FastDFN
from dfn_fast.network.reference import ReferenceDFN
from support.networks import SMALL, narrow_backbones, random_dfn

CLASSES = ["a", "b", "c", "d", "é"]
PALETTE = torch.arange(15, dtype=torch.uint8).view(5, 3).numpy()


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """Narrows the backbones: the published ResNet-18 and 50 would take most of the time."""
    with narrow_backbones():
        yield


@pytest.fixture
def model():
    return random_dfn(network=FastDFN, alpha=0.5).float().to(memory_format=torch.channels_last)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "new" / "dfn", classes=CLASSES, palette=PALETTE)
    return tmp_path / "new" / "dfn"


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same_weights(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("network", [FastDFN, ReferenceDFN])
def test_the_network_comes_back_bit_for_bit_in_eval_mode_and_channels_last(model, folder, network):
    loaded = network.from_pretrained(folder)
    assert type(loaded) is network
    assert_same_weights(loaded, model.state_dict())
    assert not any(module.training for module in loaded.modules())
    assert loaded.alpha == 0.5
    weight = loaded.smooth_aft_rrbs[0].cbr.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    plain = network.from_pretrained(folder, channels_last=False)
    assert plain.smooth_aft_rrbs[0].cbr.conv.weight.is_contiguous()


@pytest.mark.parametrize(
    "settings", [{"stem": "conv7", "border": False}, {"global_context": False, "channel_attention": False}]
)
def test_the_switches_come_back(tmp_path, settings):
    model = random_dfn(3, FastDFN, **settings).float()
    model.save_pretrained(tmp_path)
    loaded = FastDFN.from_pretrained(tmp_path)
    assert_same_weights(loaded, model.state_dict())
    image = torch.randn(1, 3, 40, 33)
    with torch.no_grad():
        torch.testing.assert_close(loaded(image), model.eval()(image), rtol=1e-4, atol=1e-3)


def test_the_files_hold_contiguous_tensors_of_published_names_and_shapes(model, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    state = safetensors.torch.load_file(folder / "model.safetensors")
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in model.state_dict().items()}
    # A reader that does not know memory formats finds the elements in index order.
    data = (folder / "model.safetensors").read_bytes()
    name = "smooth_aft_rrbs.0.cbr.conv.weight"
    begin, end = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])[name]["data_offsets"]
    start = 8 + int.from_bytes(data[:8], "little")
    values = torch.frombuffer(bytearray(data[start + begin : start + end]), dtype=torch.float32)
    assert torch.equal(values.view(16, 16, 3, 3), model.state_dict()[name])
    config = json.loads((folder / "config.json").read_text())
    assert config["class"] == "FastDFN"
    assert config["classes"] == CLASSES
    assert config["palette"] == PALETTE.tolist()
    assert config["model_config"]["num_classes"] == 5
    assert config["model_config"].items() >= SMALL.items()


def test_load_model_takes_the_folder(model, folder):
    loaded = load_model(folder)
    assert_same_weights(loaded.model, model.state_dict())
    assert loaded.classes == tuple(CLASSES)
    assert loaded.palette.tolist() == PALETTE.tolist()
    with pytest.raises(CheckpointError, match="5 classes, but 21 are needed"):
        load_model(folder, num_classes=21)


def test_a_criterion_is_not_saved_and_can_be_given(tmp_path):
    criterion = nn.CrossEntropyLoss(weight=torch.rand(3))  # adds a tensor to the network's state dict
    model = random_dfn(3, FastDFN, criterion=criterion).float()
    model.save_pretrained(tmp_path)
    assert "criterion.weight" not in safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert type(FastDFN.from_pretrained(tmp_path).criterion).__name__ == "CrossEntropyLoss"
    assert not hasattr(FastDFN.from_pretrained(tmp_path).criterion, "weight")
    loaded = FastDFN.from_pretrained(tmp_path, criterion=criterion, alpha=0.75)
    assert loaded.criterion is criterion
    assert loaded.alpha == 0.75


def test_saving_again_replaces_both_files(folder):
    other = random_dfn(4, border=False).float()
    other.save_pretrained(folder)
    assert_same_weights(ReferenceDFN.from_pretrained(folder), other.state_dict())
    assert "classes" not in json.loads((folder / "config.json").read_text())


def test_an_interrupted_save_leaves_no_pair_that_loads(model, folder, monkeypatch):
    real = pretrained_folder.replacing

    def stopped_before_the_configuration(path):
        if path.name == "config.json":
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr(pretrained_folder, "replacing", stopped_before_the_configuration)
    with torch.no_grad():
        model.smooth_heads[3].conv.bias += 1
    with pytest.raises(CheckpointError, match=r"could not be written .*No space left"):
        model.save_pretrained(folder)
    for load in (FastDFN.from_pretrained, load_model):
        with pytest.raises(CheckpointError, match="do not belong together"):
            load(folder)


def test_a_folder_that_cannot_be_written_is_an_error(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file: could not be written .* choose a folder"):
        model.save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("given", [{"classes": ["a"]}, {"palette": PALETTE[:4]}])
def test_names_and_colours_must_be_as_many_as_classes(model, tmp_path, given):
    with pytest.raises(ConfigError, match="expected one for each of the network's 5"):
        model.save_pretrained(tmp_path / "dfn", **given)
    assert not (tmp_path / "dfn").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": 2}, "expected format 1, got 2"),
        ({"clases": ["a"]}, "unknown key 'clases'; did you mean classes?"),
        ({"model_config": {"num_classes": 5, "chanels": 16}}, "unknown argument 'chanels'; did you mean channels?"),
        ({"model_config": {"channels": 16}}, "no 'num_classes'"),
        ({"model_config": {"num_classes": 5, "backbone": "vgg16"}}, "does not build a network .*vgg16"),
        ({"model_config": {"num_classes": 4, **SMALL}}, "does not fit the model|names and colours of 4|classes of 4"),
        ({"classes": ["a"]}, "classes of 5 classes, got 1|names and colours of 5 classes, got 1"),
        ({"sha256": "0"}, "do not belong together"),
    ],
)
@pytest.mark.parametrize("load", [FastDFN.from_pretrained, load_model], ids=["from_pretrained", "load_model"])
def test_a_configuration_that_is_wrong_is_an_error(folder, load, changes, text):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=f"dfn.*({text})"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_or_damaged_file_is_an_error_that_names_it(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=name):
        FastDFN.from_pretrained(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}.* does not exist"):
        FastDFN.from_pretrained(folder)


def test_what_is_no_folder_is_an_error(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: expected a folder that save_pretrained wrote"):
        FastDFN.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"this is a file; .*load_model reads it"):
        FastDFN.from_pretrained(folder / "model.safetensors")


def test_overrides_that_do_not_exist_or_do_not_fit_are_errors(folder):
    with pytest.raises(ConfigError, match="FastDFN has no argument 'chanels'; did you mean channels"):
        FastDFN.from_pretrained(folder, chanels=16)
    with pytest.raises(CheckpointError, match="5 classes, but 21 are needed"):
        FastDFN.from_pretrained(folder, num_classes=21)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        FastDFN.from_pretrained(folder, channels=8)


def test_loading_leaves_the_callers_random_numbers_alone(folder):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    FastDFN.from_pretrained(folder)
    assert torch.equal(torch.rand(4), expected)
