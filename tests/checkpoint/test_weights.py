"""Loading weights: names with and without prefixes, misfits, and ImageNet weights by file and by name."""

import hashlib
import re

import pytest
import torch
from torch import nn

from dfn_fast.checkpoint import imagenet as pretrained
from dfn_fast.checkpoint.archive import read_file
from dfn_fast.checkpoint.imagenet import BACKBONE_WEIGHTS, load_backbone
from dfn_fast.checkpoint.weights import Mismatch, load_weights, save_weights, state_dict_of
from dfn_fast.errors import CheckpointError
from dfn_fast.network.backbone import ResNet
from dfn_fast.network.reference import ReferenceDFN


class Net(nn.Module):
    """Two named layers with every kind of tensor that the networks have."""

    def __init__(self, width=6):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
        self.fc = nn.Linear(width, 4)


def random_state(model):
    return {
        name: torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else torch.tensor(7)
        for name, tensor in model.state_dict().items()
    }


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_states(state, expected):
    assert state.keys() == expected.keys()
    for name in state:
        assert torch.equal(state[name], expected[name]), name


# Names


@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module._orig_mod.module."]
)
def test_prefixes_of_wrappers_are_stripped(key, prefix):
    weight = torch.randn(2)
    state = {f"{prefix}backbone.conv1.weight": weight, f"{prefix}backbone._orig_mod.bn1.weight": weight + 1}
    content = state if key is None else {key: state, "epoch": 3, "best_accuracy": torch.tensor(0.7)}
    assert_equal_states(state_dict_of(content), {"backbone.conv1.weight": weight, "backbone.bn1.weight": weight + 1})


def test_the_real_wrappers_prefixes_are_stripped():
    net = Net()
    net.body = torch.compile(net.body)
    wrapped = torch.compile(nn.DataParallel(torch.compile(net)))
    expected = {name.replace("._orig_mod", ""): tensor for name, tensor in net.state_dict().items()}
    assert expected.keys() == Net().state_dict().keys()
    assert_equal_states(state_dict_of(wrapped.state_dict()), expected)


def test_the_same_weights_twice_are_an_error():
    with pytest.raises(CheckpointError, match="twice"):
        state_dict_of({"a.weight": torch.zeros(1), "module.a.weight": torch.ones(1)})


def test_content_without_a_state_dict_is_an_error_with_what_there_is():
    with pytest.raises(CheckpointError, match=r"my file: expected a state dict.*got epoch, loss"):
        state_dict_of({"epoch": 3, "loss": 0.5}, "my file")
    with pytest.raises(CheckpointError, match="got nothing"):
        state_dict_of({})


# Fitting


def test_all_tensors_are_loaded_and_nothing_is_reported():
    net = Net()
    state = random_state(net)
    assert load_weights(net, {"model": state}) == Mismatch()
    assert_equal_states(net.state_dict(), state)


def test_a_wrapped_model_takes_plain_weights():
    net = Net()
    state = random_state(net)
    load_weights(torch.compile(nn.DataParallel(net)), state)
    assert_equal_states(net.state_dict(), state)


def misfit():
    """A state dict with six missing, one unexpected and one wrong-shaped tensor for ``Net``."""
    state = random_state(Net())
    kept = {"body.0.weight": state["body.0.weight"], "fc.bias": torch.rand(9)}
    return kept | {"head.weight": torch.rand(1)}


def test_a_mismatch_names_the_first_of_each_kind_with_all_counts_and_both_shapes(tmp_path):
    net = Net()
    before = snapshot(net)
    torch.save(misfit(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError) as error:
        load_weights(net, tmp_path / "other.pth")
    text = str(error.value)
    assert text.startswith(str(tmp_path / "other.pth"))
    assert "6 missing: body.0.bias, body.1.weight, body.1.bias, body.1.running_mean, body.1.running_var, ...;" in text
    assert "1 unexpected: head.weight;" in text
    assert "1 wrong shape: fc.bias (model [4], file [9])" in text
    assert "strict=False" in text
    assert_equal_states(net.state_dict(), before)


def test_a_relaxed_load_takes_what_fits_and_reports_the_rest():
    net = Net()
    before, state = snapshot(net), misfit()
    mismatch = load_weights(net, state, strict=False)
    assert_equal_states(net.state_dict(), before | {"body.0.weight": state["body.0.weight"]})
    assert mismatch
    assert mismatch.missing[:2] == ("body.0.bias", "body.1.weight")
    assert len(mismatch.missing) == 6
    assert mismatch.unexpected == ("head.weight",)
    assert mismatch.wrong_shape == (("fc.bias", (4,), (9,)),)


def test_a_relaxed_load_of_which_nothing_fits_is_an_error():
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(Net(), {"other.weight": torch.rand(3)}, strict=False)


def test_num_batches_tracked_may_be_missing():
    net = Net()
    state = random_state(net)
    del state["body.1.num_batches_tracked"]
    assert not load_weights(net, state)
    assert torch.equal(net.body[1].running_var, state["body.1.running_var"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("strict", [True, False])
def test_weights_that_are_not_finite_are_refused_by_name(value, strict):
    net = Net()
    before, state = snapshot(net), random_state(net)
    state["body.1.running_var"][2] = value
    with pytest.raises(CheckpointError, match=r"my run: 1 tensors hold nan or infinity: body\.1\.running_var\."):
        load_weights(net, state, strict=strict, where="my run")
    assert_equal_states(net.state_dict(), before)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_channels_last_model_is_saved_and_loaded_in_its_own_layout(tmp_path, suffix):
    net, path = Net().to(memory_format=torch.channels_last), tmp_path / f"net{suffix}"
    state = random_state(net)
    load_weights(net, state)
    save_weights(torch.compile(net), path)
    assert all(tensor.is_contiguous() for tensor in read_file(path).values())
    again = Net().to(memory_format=torch.channels_last)
    load_weights(again, path)
    assert_equal_states(again.state_dict(), state)
    weight = again.body[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_half_precision_weights_load_into_float32(tmp_path):
    net, state = Net(), random_state(Net())
    load_weights(net, {n: t.half() if t.is_floating_point() else t for n, t in state.items()})
    assert net.fc.weight.dtype == torch.float32
    torch.testing.assert_close(net.fc.weight.data, state["fc.weight"].half().float(), rtol=0, atol=0)


def test_weights_are_not_saved_under_an_unknown_suffix(tmp_path):
    with pytest.raises(CheckpointError, match=r"net\.onnx: expected one of the suffixes \.safetensors \.pth"):
        save_weights(Net(), tmp_path / "net.onnx")


# ImageNet weights


def imagenet_state(depth, stem):
    """A state dict as published for a classifier: the backbone's names and ``fc``."""
    with torch.device("meta"):
        backbone = ResNet(depth, stem)
    state = random_state(backbone)
    return state | {"fc.weight": torch.rand(1000, backbone.channels[-1]), "fc.bias": torch.rand(1000)}


def without_fc(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def test_a_published_file_loads_without_its_classifier(tmp_path):
    state = imagenet_state("resnet18", "conv7")
    torch.save(state, tmp_path / "resnet18.pth")
    backbone = ResNet("resnet18", "conv7")
    assert not load_backbone(backbone, str(tmp_path / "resnet18.pth"))
    assert_equal_states(backbone.state_dict(), without_fc(state))


def test_a_whole_dfn_gives_its_backbone(tmp_path):
    model = ReferenceDFN(3, backbone="resnet18", channels=8)
    torch.save({"model": {f"module.{n}": t for n, t in model.state_dict().items()}}, tmp_path / "dfn.pth")
    backbone = ResNet("resnet18", "deep")
    assert not load_backbone(backbone, tmp_path / "dfn.pth")
    assert_equal_states(backbone.state_dict(), model.backbone.state_dict())


def test_a_stem_of_other_widths_fails_with_both_shapes(tmp_path):
    """timm's "d" variants: a 32-32-64 stem, and an average pool in front of the projection's convolution."""
    state = imagenet_state("resnet18", "deep")
    state["conv1.0.weight"] = torch.rand(32, 3, 3, 3)
    for number in (2, 3, 4):
        for name in [n for n in state if n.startswith(f"layer{number}.0.downsample.")]:
            state[name.replace("downsample.1.", "downsample.2.").replace("downsample.0.", "downsample.1.")] = state[
                name
            ]
        del state[f"layer{number}.0.downsample.0.weight"]
    torch.save(state, tmp_path / "resnet18d.pth")
    with pytest.raises(CheckpointError) as error:
        load_backbone(ResNet("resnet18", "deep"), tmp_path / "resnet18d.pth")
    assert "conv1.0.weight (model [64, 3, 3, 3], file [32, 3, 3, 3])" in str(error.value)
    assert "layer2.0.downsample.0.weight" in str(error.value)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A stand-in for the published resnet18: a file with its hash in its name, and an empty download folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    state = imagenet_state("resnet18", "conv7")
    file = tmp_path / "resnet18.pth"
    torch.save(state, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    file = file.rename(tmp_path / f"resnet18-{digest}.pth")
    monkeypatch.setitem(BACKBONE_WEIGHTS, "resnet18", file.as_uri())
    return file, state


def test_weights_by_name_are_fetched_checked_and_kept(published, tmp_path):
    file, state = published
    for _ in range(2):
        backbone = ResNet("resnet18", "conv7")
        assert not load_backbone(backbone, "resnet18")
        assert_equal_states(backbone.state_dict(), without_fc(state))
        assert (tmp_path / "home" / "hub" / "checkpoints" / file.name).exists()
        file.unlink(missing_ok=True)  # the second load uses the cached copy


def test_a_download_with_another_hash_is_refused(published, tmp_path, monkeypatch):
    file, _ = published
    wrong = file.rename(tmp_path / "resnet18-00000000.pth")
    monkeypatch.setitem(BACKBONE_WEIGHTS, "resnet18", wrong.as_uri())
    with pytest.raises(CheckpointError, match=r"resnet18-00000000\.pth: the download does not have the published hash"):
        load_backbone(ResNet("resnet18", "conv7"), "resnet18")
    assert not list((tmp_path / "home" / "hub" / "checkpoints").iterdir())


def test_a_download_that_fails_says_where_from_and_what_to_do(published):
    file, _ = published
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file.name} could not be fetched .*download it yourself and give"):
        load_backbone(ResNet("resnet18", "conv7"), "resnet18")


def test_a_damaged_kept_copy_is_to_be_deleted(published, tmp_path):
    file, _ = published
    load_backbone(ResNet("resnet18", "conv7"), "resnet18")
    kept = tmp_path / "home" / "hub" / "checkpoints" / file.name
    kept.write_bytes(kept.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(kept))}: this copy of .* is damaged; delete it"):
        load_backbone(ResNet("resnet18", "conv7"), "resnet18")


def test_only_weights_are_loaded_from_a_download(monkeypatch):
    asked = {}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: asked.update(options, url=url))
    with pytest.raises(AttributeError):  # the stand-in returns nothing
        load_backbone(ResNet("resnet18", "conv7"), "resnet18")
    assert asked == {
        "url": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
        "check_hash": True,
        "weights_only": True,
        "map_location": "cpu",
    }


@pytest.mark.parametrize(
    ("depth", "stem", "name", "text"),
    [
        ("resnet101", "deep", "resnet101", "resnet101s fits resnet101 with the deep stem"),
        ("resnet50", "conv7", "resnet50s", "resnet50, resnet50_v2 fits"),
        ("resnet50", "conv7", "resnet101", "resnet50, resnet50_v2 fits"),
        ("resnet18", "deep", "resnet18", "no name fits resnet18 with the deep stem"),
        ("resnet18", "conv7", "resnet16", "neither a file nor the name.* resnet18 fits"),
        ("resnet18", "conv7", "resnet18.pth", "does not exist"),
    ],
)
def test_a_name_that_does_not_fit_is_answered_with_those_that_do(depth, stem, name, text):
    with torch.device("meta"):
        backbone = ResNet(depth, stem)
    with pytest.raises(CheckpointError, match=f"^{name}.*{text}"):
        load_backbone(backbone, name)


def test_published_names_tell_depth_stem_and_hash():
    for name, url in BACKBONE_WEIGHTS.items():
        depth = re.match(r"resnet\d+", name)[0]
        backbone = torch.nn.Module()
        backbone.depth, backbone.stem = depth, "deep" if name.endswith("s") else "conv7"
        assert name in pretrained.names_for(backbone)
        assert re.search(rf"/(gluon_)?{depth}(_v1s)?-[0-9a-f]{{8}}\.pth$", url)
        assert ("_v1s" in url) == name.endswith("s")
    assert len(set(BACKBONE_WEIGHTS.values())) == len(BACKBONE_WEIGHTS) == 11


def test_the_network_takes_pretrained_weights_by_file(tmp_path):
    state = imagenet_state("resnet18", "deep")
    torch.save(state, tmp_path / "resnet18.pth")
    model = ReferenceDFN(3, backbone="resnet18", channels=8, pretrained_model=str(tmp_path / "resnet18.pth"))
    assert_equal_states(model.backbone.state_dict(), without_fc(state))
