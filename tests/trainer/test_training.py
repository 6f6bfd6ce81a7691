from unittest.mock import patch

import pytest
import torch

from dfn_fast.config import TrainConfig
from dfn_fast.runtime.processes import World
from dfn_fast.runtime.random_state import random_state, set_random_state
from dfn_fast.train.loss_watch import LossWatch
from dfn_fast.trainer.build import build_model, parameter_groups, poly
from dfn_fast.trainer.finite import NonFiniteLoss
from dfn_fast.trainer.parallel import valid_shares
from support.networks import narrow_backbones
from support.steps import tiny_batch, tiny_trainer, with_scaler


@pytest.fixture(scope="module", autouse=True)
def narrow():
    with narrow_backbones(resnet18=1):
        yield


def small(**changes):
    return TrainConfig(backbone="resnet18", channels=8, border_channels=4, **changes)


def test_the_factor_of_new_layers_reaches_the_update():
    """In a step without momentum and decay a weight moves by its rate times its gradient."""
    moved = {}
    for factor in (1.0, 10.0):
        trainer = tiny_trainer(new_layer_lr=factor, lr=1.0, momentum=0.0, weight_decay=0.0)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.step([tiny_batch()], 0)
        moved[factor] = {name: before[name] - p.detach() for name, p in trainer.model.named_parameters()}
    for name in ("backbone.layer1.0.conv1.weight", "smooth_heads.3.conv.weight", "smooth_pre_rrbs.0.conv_1x1.weight"):
        times = 1 if name.startswith("backbone.") else 10
        scale = moved[1.0][name].abs().max().item()
        assert scale > 0
        torch.testing.assert_close(moved[10.0][name], times * moved[1.0][name], rtol=0, atol=1e-3 * times * scale)


@pytest.mark.parametrize("decay", [True, False])
def test_every_parameter_is_in_one_group(decay):
    config = small(new_layer_lr=10.0, decay_norm_and_bias=decay, weight_decay=0.5)
    model = build_model(config, 3)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = {}
    for group in parameter_groups(model, config):
        for p in group["params"]:
            name = names[id(p)]
            assert name not in seen
            seen[name] = (group["lr_factor"], group["weight_decay"])
    assert seen.keys() == set(names.values())
    assert seen["backbone.conv1.0.weight"] == (1.0, 0.5)
    assert seen["backbone.bn1.weight"] == (1.0, 0.5 if decay else 0.0)
    assert seen["cabs.0.channel_attention.fc.0.weight"] == (10.0, 0.5)
    assert seen["smooth_heads.3.conv.bias"] == (10.0, 0.5 if decay else 0.0)


def test_the_poly_policy():
    assert poly(0, 100, 0.9) == 1
    assert poly(50, 100, 0.9) == pytest.approx(0.5**0.9)
    assert poly(99, 100, 2) == pytest.approx(1e-4)


def test_random_states_come_back_through_a_file(tmp_path):
    import random

    import numpy as np

    torch.save(random_state(), tmp_path / "state.pth")
    first = random.random(), np.random.rand(), torch.rand(1).item()
    set_random_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first


def test_losses_are_read_in_order_and_once():
    watch = LossWatch()
    for iteration in range(3):
        watch.add(iteration, torch.tensor(float(iteration)), [f"image {iteration}"])
    assert watch.read() == [0.0, 1.0, 2.0]
    assert watch.read() == []


@pytest.mark.parametrize("loss", ["nan", "inf", "-inf"])
def test_the_iteration_and_images_of_a_loss_that_is_not_finite_are_named(loss):
    watch = LossWatch()
    watch.add(6, torch.tensor(1.0), ["fine"])
    watch.add(7, torch.tensor(float(loss)), ["broken_a", "broken_b"])
    with pytest.raises(NonFiniteLoss, match=f"is {loss} at iteration 8; the images were broken_a, broken_b"):
        watch.read()


def test_labels_and_borders_have_a_share_each():
    """Here the labels of a process have other counts of valid pixels than its border targets."""
    batch = tiny_batch()
    trainer = tiny_trainer()
    trainer.model.eval()
    images, labels, borders = batch[:3]
    with torch.no_grad():
        both, smooth, edge = (
            trainer.loss(images, labels, borders, torch.tensor(shares)).item()
            for shares in ([2.0, 0.5], [1.0, 0.0], [0.0, 1.0])
        )
    assert min(smooth, edge) > 0.01
    assert both == pytest.approx(2 * smooth + 0.5 * edge, rel=1e-5)
    labels, borders = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(1, 4, 4, dtype=torch.uint8)
    labels[0, :3], borders[0, :1] = 255, 255
    others = torch.tensor([12, 4])
    with patch.object(World, "sum", lambda self, own: own + others):
        shares = valid_shares(World(0, 2), labels, borders)
    torch.testing.assert_close(shares, torch.tensor([2 * 4 / 16, 2 * 12 / 16]))
    nothing = torch.full_like(labels, 255)
    with patch.object(World, "sum", lambda self, own: own):  # nowhere a valid pixel
        assert valid_shares(World(0, 2), nothing, nothing).tolist() == [0, 0]


def test_the_scale_of_the_loss_continues():
    first, second = (with_scaler(tiny_trainer()) for _ in range(2))
    for _ in range(3):
        first.scaler.scale(torch.ones(()))
        first.scaler.update(2.0**7)
    second.load_state(first.state())
    assert second.scaler.get_scale() == 2.0**7
    assert second.scaler.state_dict() == first.scaler.state_dict() != with_scaler(tiny_trainer()).scaler.state_dict()


def test_the_torchseg_focal_loss_is_a_choice():
    from dfn_fast.network.losses import focal_loss, torchseg_focal_loss

    assert build_model(small(), 3).aux_criterion.formula is focal_loss
    assert build_model(small(focal="torchseg"), 3).aux_criterion.formula is torchseg_focal_loss
