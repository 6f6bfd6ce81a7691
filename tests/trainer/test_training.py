import pytest
import torch

from dfn_fast.config import TrainConfig
from dfn_fast.runtime.random_state import random_state, set_random_state
from dfn_fast.train.loss_watch import LossWatch
from dfn_fast.trainer.build import build_model, parameter_groups, poly
from dfn_fast.trainer.finite import NonFiniteLoss
from support.networks import narrow_backbones


@pytest.fixture(scope="module", autouse=True)
def narrow():
    with narrow_backbones(resnet18=1):
        yield


def small(**changes):
    return TrainConfig(backbone="resnet18", channels=8, border_channels=4, **changes)


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


def test_the_iteration_and_images_of_a_nan_are_named():
    watch = LossWatch()
    watch.add(6, torch.tensor(1.0), ["fine"])
    watch.add(7, torch.tensor(float("nan")), ["broken_a", "broken_b"])
    with pytest.raises(NonFiniteLoss, match="nan at iteration 8; the images were broken_a, broken_b"):
        watch.read()


def test_the_torchseg_focal_loss_is_a_choice():
    from dfn_fast.network.losses import focal_loss, torchseg_focal_loss

    assert build_model(small(), 3).aux_criterion.formula is focal_loss
    assert build_model(small(focal="torchseg"), 3).aux_criterion.formula is torchseg_focal_loss
