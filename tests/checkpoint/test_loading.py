"""Networks from checkpoint files: our own, other people's, and hostile ones."""

import threading

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from dfn_fast.checkpoint.archive import save_atomic
from dfn_fast.checkpoint.weights import build, save_weights
from dfn_fast.data.datasets.camvid import CamVidDataset
from dfn_fast.data.datasets.cityscapes import CityscapesDataset
from dfn_fast.data.datasets.voc import VocDataset
from dfn_fast.errors import CheckpointError
from dfn_fast.inference.loading import load_model
from dfn_fast.network.arguments import infer_arguments
from dfn_fast.network.fast import FastDFN
from dfn_fast.network.reference import ReferenceDFN
from support.networks import narrow_backbones, published_backbones

SMALL = {"backbone": "resnet18", "channels": 8, "border_channels": 5}


@pytest.fixture(scope="module", autouse=True)
def narrow():
    with narrow_backbones():
        yield


def small_dfn(num_classes=4, **settings):
    """A small network whose norm layers and biases differ from their initial values."""
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


@pytest.fixture(scope="module")
def small_checkpoint():
    return training_checkpoint(small_dfn())


def assert_same_weights(model, state):
    ours = model.state_dict()
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], state[name]) for name in ours)


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
    """A file of the authors' trainer: DistributedDataParallel's names under 'model', with the optimiser."""
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
        ({"model_config": {"num_classes": 4, "wings": 2}}, "does not build a network .*wings"),
        ({"model_config": {"num_classes": 4, "backbone": "vgg16"}}, "does not build a network .*vgg16"),
        ({"classes": ["a", "b", "c"]}, "expected names and colours of 4 classes, got 3 and 4"),
        ({"model_config": {"num_classes": 4, **SMALL, "channels": 9}}, r"wrong shape: .*\(model \[9, 64, 1, 1\]"),
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


def test_no_random_weights_are_drawn_where_all_are_loaded(tmp_path):
    """They take most of the time to load a large network."""
    drawn = []

    class Drawn(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function in (torch.Tensor.normal_, torch.nn.init.kaiming_uniform_) and not result.is_meta:
                drawn.append(function)
            return result

    model = small_dfn()
    save_weights(model, tmp_path / "dfn.pth")
    with Drawn():
        loaded = load_model(tmp_path / "dfn.pth")
    assert not drawn
    assert_same_weights(loaded.model, model.state_dict())
    trained = [parameter.requires_grad for parameter in FastDFN(4, **SMALL).parameters()]
    assert [parameter.requires_grad for parameter in loaded.model.parameters()] == trained


def test_what_a_relaxed_load_leaves_out_is_random(tmp_path):
    state = small_dfn().state_dict()
    del state["smooth_heads.3.conv.weight"]
    torch.save(training_checkpoint(small_dfn()) | {"model": state}, tmp_path / "dfn.pth")
    weight = load_model(tmp_path / "dfn.pth", strict=False).model.smooth_heads[3].conv.weight
    assert weight.isfinite().all()
    assert weight.std() > 1e-3


def test_other_threads_draw_random_weights_meanwhile():
    inside, done, found = threading.Event(), threading.Event(), []

    class Waiting(ReferenceDFN):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            inside.set()
            done.wait()

    thread = threading.Thread(target=lambda: found.append(build(Waiting, {"num_classes": 3, **SMALL}, random=False)))
    thread.start()
    inside.wait()
    weight = torch.nn.Conv2d(8, 8, 3).weight
    done.set()
    thread.join()
    assert weight.isfinite().all()
    assert found[0].smooth_heads[3].conv.weight.isnan().all()  # memory that nobody wrote, as the tests fill it


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
@pytest.mark.parametrize("stem", ["deep", "conv7"])
def test_configuration_is_inferred_from_names_and_shapes(backbone, stem):
    settings = {"backbone": backbone, "stem": stem, "channels": 24, "border_channels": 9}
    ablations = ("global_context", "channel_attention", "deep_supervision", "border")
    with torch.device("meta"), published_backbones():
        for off in (None, *ablations):
            config = {"num_classes": 13, **settings, **{name: name != off for name in ablations}}
            inferred = infer_arguments(ReferenceDFN(**config).state_dict())
            if off == "border":
                config["border_channels"] = 21  # not in the file, and nothing depends on it
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
    """A tensor that stores one number in the file, but any number in memory once it is copied."""
    return torch.zeros((), dtype=dtype).expand(shape)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"channels": 10**9}, "does not build a network|parameters, but its weights have"),
        ({"channels": 10**5}, r"asks for a network of \d+ parameters, but its weights have 16384 bytes"),
        ({"num_classes": 10**6}, "asks for a network of|does not build a network"),
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
        text = f"not stored as one real number|{text}"
    save_atomic({"format": 1, "model": state, "model_config": settings}, tmp_path / "a.pth")
    built = watch_networks(monkeypatch)
    with pytest.raises(CheckpointError, match=rf"a\.pth: .*({text})") as caught:
        load_model(tmp_path / "a.pth")
    assert len(str(caught.value)) < 1000
    assert not built


def watch_networks(monkeypatch):
    """A list of the networks built from now on, except on the meta device."""
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
        {"classes": ["a", "b", "c", "d" * 201]},
        {"palette": "red"},
        {"palette": [[0, 0, 256]] * 4},
        {"palette": [[0, 0]] * 4},
        {"palette": [1, 2, 3, 4]},
        {"dataset": ["voc"]},
        {"config": [1]},
        {"config": {"border_width": "wide"}},
        {"config": {"border_width": True}},
        {"config": {"ignore_value": True}},
        {"config": {"label_offset": "-1"}},
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


def test_a_dictionary_that_holds_itself_ends(tmp_path):
    content = {}
    content["model"] = content
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: expected a state dict"):
        load_model(tmp_path / "a.pth")
