"""Errors that both networks share, and uses that a drop-in replacement must support."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from dfn_fast import FastDFN, ReferenceDFN
from dfn_fast.checkpoint.weights import load_weights
from dfn_fast.errors import CheckpointError
from dfn_fast.network.losses import CrossEntropyLoss
from support.networks import batch, narrow_backbones

NETWORKS = (ReferenceDFN, FastDFN)
SIZES = {"backbone": "resnet18", "channels": 8, "border_channels": 4}


@pytest.fixture(scope="module", autouse=True)
def narrow():
    with narrow_backbones():
        yield


def small(network, num_classes=5, **settings):
    torch.manual_seed(0)
    return network(num_classes, **SIZES, **settings).double()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda labels: torch.where(labels == 0, 5, labels), "got 5"),
        (lambda labels: torch.where(labels == 255, -1, labels), "got -1"),
        (lambda labels: torch.where(labels == 255, -100, labels), "got -100"),
        (lambda labels: torch.where(labels == 255, 254, labels).to(torch.uint8), "got 254"),
    ],
    ids=["1..K", "-1", "-100", "254"],
)
def test_a_label_that_is_no_class_is_an_error(network, change, found):
    images, labels, borders = batch((40, 48))
    with pytest.raises(ValueError, match=rf"expected labels 0..4, or 255 for pixels to ignore, {found}"):
        small(network)(images, change(labels), borders)


@pytest.mark.parametrize("network", NETWORKS)
def test_labels_of_another_size_are_an_error(network):
    images, labels, borders = batch((40, 48))
    model = small(network)
    with pytest.raises(ValueError, match=r"expected integer labels \[2, 40, 48\].* got torch.int64 \[2, 20, 24\]"):
        model(images, labels[:, ::2, ::2], borders)
    with pytest.raises(ValueError, match=r"got torch.float64 \[2, 40, 48\]"):
        model(images, labels.double(), borders)
    with pytest.raises(ValueError, match=r"expected aux_label \[2, 40, 48\].* got \[2, 20, 24\]"):
        model(images, labels, borders[:, ::2, ::2])


@pytest.mark.parametrize("network", NETWORKS)
def test_one_label_map_alone_is_an_error(network):
    images, labels, borders = batch((40, 48))
    with pytest.raises(ValueError, match="got label, no aux_label"):
        small(network)(images, labels)
    with pytest.raises(ValueError, match="got aux_label, no label"):
        small(network)(images, aux_label=borders)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_ignored_value_may_not_be_a_class(network):
    images, labels, borders = batch((40, 48))
    with pytest.raises(ValueError, match=r"5 classes have the ids 0..4, but 3 is ignored: expected at most 3 classes"):
        small(network, criterion=CrossEntropyLoss(ignore_index=3))(images, labels, borders)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_criterion_of_your_own_gets_any_labels(network):
    images, labels, borders = batch((40, 48))
    shifted = torch.where(labels == 255, -100, labels)
    assert small(network, criterion=nn.CrossEntropyLoss())(images, shifted, borders).isfinite()


@pytest.mark.slow
def test_a_compiled_network_makes_the_loss_nan():
    """As on a GPU, where no step waits to check the labels."""
    images, labels, borders = batch((40, 48))
    compiled = torch.compile(small(FastDFN), backend="eager", fullgraph=True)
    assert compiled(images, labels, borders).isfinite()
    labels[0, 0, 0] = 7
    assert compiled(images, labels, borders).isnan()


def test_the_authors_constructor_works():
    model = FastDFN(out_planes=4, criterion=nn.CrossEntropyLoss(ignore_index=255), **SIZES)
    assert model.num_classes == 4
    for arguments in ({}, {"num_classes": 3, "out_planes": 3}):
        with pytest.raises(TypeError, match="expected num_classes, or out_planes"):
            FastDFN(**arguments, **SIZES)


def test_backbone_weights_may_be_a_state_dict():
    donor = small(ReferenceDFN)
    for state in (donor.backbone.state_dict(), donor.state_dict()):
        model = FastDFN(3, pretrained_model=state, **SIZES)
        torch.testing.assert_close(model.backbone.conv1[0].weight.double(), donor.backbone.conv1[0].weight)


@pytest.mark.parametrize("load", ["DFN", "backbone"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: AveragedModel(model).state_dict(),
        lambda model: {"state_dict": {f"model.{name}": x for name, x in model.state_dict().items()}, "epoch": 1},
        lambda model: {"state_dict": {f"net.module.{name}": x for name, x in model.state_dict().items()}},
        lambda model: {"model_ema": model.state_dict(), "epoch": 1},
    ],
    ids=["AveragedModel", "model.", "net.module.", "model_ema"],
)
def test_checkpoints_of_training_frameworks_load(wrap, load):
    donor = small(ReferenceDFN)
    model = FastDFN(5, pretrained_model=wrap(donor) if load == "backbone" else None, **SIZES)
    if load == "DFN":
        assert not load_weights(model, wrap(donor))
        torch.testing.assert_close(model.smooth_heads[3].conv.weight.double(), donor.smooth_heads[3].conv.weight)
    torch.testing.assert_close(model.backbone.layer4[0].conv1.weight.double(), donor.backbone.layer4[0].conv1.weight)


def test_weights_that_are_infinite_in_the_models_dtype_are_refused():
    state = small(ReferenceDFN).state_dict()
    state["smooth_heads.3.conv.bias"] = torch.full_like(state["smooth_heads.3.conv.bias"], 1e300)
    with pytest.raises(CheckpointError, match=r"1 tensors hold nan or infinity: smooth_heads.3.conv.bias"):
        load_weights(FastDFN(5, **SIZES), state)


@pytest.mark.parametrize("border", [True, False])
def test_stock_data_parallel_training_works(border, tmp_path):
    """Trains under DistributedDataParallel without find_unused_parameters, as Lightning and accelerate use it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = small(FastDFN, border=border)
        parallel = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        images, labels, borders = batch((40, 48))
        for _ in range(3):
            optimizer.zero_grad()
            parallel(images, labels, borders).backward()
            optimizer.step()
    finally:
        dist.destroy_process_group()
    unused = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert all(name.startswith("border_aft_rrbs.0.") for name in unused)
    assert len(unused) == (5 if border else 0)
