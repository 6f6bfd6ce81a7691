"""Networks whose modules are changed after construction: every network computes the same as the changed plain one."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from dfn_fast import FastDFN, FusedDFN, Predictor, ReferenceDFN
from dfn_fast.errors import UserError
from dfn_fast.network.structure import unchanged
from support.networks import batch, narrow_backbones

SIZES = {"num_classes": 3, "backbone": "resnet18", "channels": 8, "border_channels": 4}


@pytest.fixture(scope="module", autouse=True)
def narrow():
    with narrow_backbones():
        yield


class Lora(nn.Module):
    """A convolution with a low-rank update beside it, as in adapters."""

    def __init__(self, conv):
        super().__init__()
        self.base, rank = conv, 2
        self.down = nn.Conv2d(conv.in_channels, rank, 1, bias=False)
        self.up = nn.Conv2d(rank, conv.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.ReLU):
    """A subclass of ReLU that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class Scaled(nn.BatchNorm2d):
    """A subclass of BatchNorm2d that computes something else."""

    def forward(self, x):
        return 0.5 * super().forward(x)


def parts(model):
    """One block of each kind."""
    return (model.backbone.layer2[0], model.smooth_pre_rrbs[1], model.smooth_aft_rrbs[2], model.border_pre_rrbs[1])


def convolutions(model):
    found = [m for part in parts(model) for m in part.modules() if isinstance(m, nn.Conv2d)]
    return [conv for conv in found if conv.kernel_size == (3, 3) and conv.stride == (1, 1)]


def each(change):
    return lambda model: [change(conv) for conv in convolutions(model)]


def replace(kind, make):
    def change(model):
        for module in [m for part in (*parts(model), model.backbone) for m in part.modules()]:
            for name, child in list(module.named_children()):
                if type(child) is kind:
                    setattr(module, name, make(child))

    return change


def set_all(**values):
    return each(lambda conv: [setattr(conv, name, value) for name, value in values.items()])


def wrap_convolutions(model):
    for block in (model.smooth_pre_rrbs[1], model.smooth_aft_rrbs[2], model.border_aft_rrbs[1]):
        block.conv_refine = Lora(block.conv_refine)


def own_forward(model):
    block = model.smooth_aft_rrbs[1]
    forward = type(block).forward
    block.forward = lambda x: 0.5 * forward(block, x)


def norms(model):
    for block in (model.smooth_pre_rrbs[0], model.smooth_pre_rrbs[1], model.border_pre_rrbs[0]):
        norm = Scaled(block.cbr.bn.num_features)
        norm.load_state_dict(block.cbr.bn.state_dict())
        block.cbr.bn = norm


def gates(model):
    model.cabs[1].channel_attention.fc[1] = nn.SiLU()
    model.cabs[2].channel_attention.fc[3] = nn.Hardsigmoid()


def reflect(conv):
    conv.__init__(conv.in_channels, conv.out_channels, 3, 1, 1, bias=False, padding_mode="reflect")


def normalise(conv):
    parametrizations.weight_norm(conv).parametrizations.weight.original0.data.mul_(1.5)


CHANGES = {
    "dilation": set_all(dilation=(2, 2), padding=(2, 2)),
    "padding mode": each(reflect),
    "bias": each(lambda conv: setattr(conv, "bias", nn.Parameter(torch.randn(conv.out_channels)))),
    "activation": replace(nn.ReLU, lambda relu: nn.SiLU()),
    "activation of a subclass": replace(nn.ReLU, lambda relu: Doubled()),
    "pool": lambda model: setattr(model.backbone, "maxpool", nn.AvgPool2d(3, 2, 1)),
    "ceil mode of the pool": lambda model: setattr(model.backbone.maxpool, "ceil_mode", True),
    "global pool": lambda model: model.global_context.__setitem__(0, nn.AdaptiveMaxPool2d(1)),
    "norm of a subclass": norms,
    "no norm": lambda model: setattr(model.smooth_pre_rrbs[1].cbr, "bn", nn.Identity()),
    "gate": gates,
    "spectral norm": each(nn.utils.spectral_norm),
    "weight norm": each(normalise),
    "pruning": each(lambda conv: prune.random_unstructured(conv, "weight", 0.5)),
    "adapter": wrap_convolutions,
    "own forward": own_forward,
    "hook on a head": lambda model: model.smooth_heads[3].register_forward_hook(lambda m, i, out: 0.5 * out),
    "hook within a head": lambda model: model.smooth_heads[3].conv.register_forward_hook(lambda m, i, out: 0.5 * out),
    "hook on a CAB": lambda model: model.cabs[0].register_forward_hook(lambda m, i, out: 0.5 * out),
    "hook on a gate": lambda model: model.cabs[1].channel_attention.register_forward_hook(lambda m, i, out: 1 - out),
    "hook on an RRB": lambda model: model.smooth_aft_rrbs[3].register_forward_hook(lambda m, i, out: 0.5 * out),
    "hook before an RRB": lambda model: model.smooth_pre_rrbs[3].register_forward_pre_hook(lambda m, i: (0.5 * i[0],)),
    "hook on the border": lambda model: model.border_pre_rrbs[2].register_forward_hook(lambda m, i, out: 0.5 * out),
    "hook on a border head": lambda model: model.border_heads[3].register_forward_hook(lambda m, i, out: 0.5 * out),
}  # fmt: skip


def changed(network, change=None):
    torch.manual_seed(0)
    model = network(**SIZES).double()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 2)
    for head in model.smooth_heads:
        nn.init.normal_(head.conv.weight)
    torch.manual_seed(1)
    if change is not None:
        CHANGES[change](model)
    return model.double().eval()


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    return torch.randn(1, 3, 64, 72, dtype=torch.float64)


@pytest.mark.parametrize("change", CHANGES)
def test_every_network_computes_the_change(data, change):
    with torch.no_grad():
        expected, before = changed(ReferenceDFN, change)(data), changed(ReferenceDFN)(data)
        fast = changed(FastDFN, change)
        torch.testing.assert_close(fast(data), expected, rtol=1e-9, atol=1e-9)
        for model in (fast, changed(ReferenceDFN, change)):
            torch.testing.assert_close(FusedDFN(model)(data), expected, rtol=1e-9, atol=1e-9)
    if "border" not in change:
        assert (expected - before).abs().max() > 1e-3, "the change has no effect"


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_losses_and_borders_are_those_of_the_changed_network(change):
    images, labels, borders = batch((40, 48))
    losses, scores = [], []
    for network in (ReferenceDFN, FastDFN):
        model = changed(network, change)
        losses.append(model(images, labels % 3, borders))
        scores.append(model.scores(images).border[-1])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-8, atol=1e-8)
    fused = FusedDFN(model, return_border=True)
    small = fused.border_scores(fused.stages(images), images.shape[2:])
    resized = torch.nn.functional.interpolate(small, images.shape[2:], mode="bilinear", align_corners=True)
    torch.testing.assert_close(resized, scores[0], rtol=1e-8, atol=1e-8)


def test_as_built_every_block_takes_the_fast_path():
    model = changed(FastDFN)
    blocks = [*model.smooth_pre_rrbs, *model.smooth_aft_rrbs, *model.smooth_heads, *model.cabs, *model.border_pre_rrbs]
    blocks += [*model.border_aft_rrbs, *model.border_heads]
    blocks += [block for i in (1, 2, 3, 4) for block in getattr(model.backbone, f"layer{i}")]
    assert all(unchanged(block) for block in blocks)
    names = {type(module).__name__ for module in FusedDFN(model, return_border=True).modules()}
    assert not [name for name in names if name.startswith("Kept")]


def test_hooks_fire_in_every_network(data):
    """Hooks as for Grad-CAM and attention vectors: on CABs, gates, RRBs and heads."""
    for network in (ReferenceDFN, FastDFN):
        model, seen = changed(network), []
        for name in ("cabs.2", "cabs.3.channel_attention", "smooth_pre_rrbs.0", "smooth_aft_rrbs.3", "smooth_heads.3"):
            model.get_submodule(name).register_forward_hook(lambda *args, seen=seen: seen.append(args[0]))
        model(data)
        assert len(seen) == 5
        FusedDFN(model)(data)
        assert len(seen) == 10


def test_a_hooks_owner_is_not_copied(data):
    class Recorder:
        def __init__(self):
            self.outputs = []

        def __call__(self, module, inputs, output):
            self.outputs.append(output)

    model, recorder = changed(FastDFN), Recorder()
    model.cabs[3].register_forward_hook(recorder)
    FusedDFN(model)(data)
    assert len(recorder.outputs) == 1


def test_a_change_that_no_check_knows_is_an_error():
    model = changed(FastDFN)
    model.stages = lambda images: [0.5 * stage for stage in type(model).stages(model, images)]
    with pytest.raises(UserError, match="does not compute what the model does: log-probabilities differ by"):
        FusedDFN(model)


def test_the_comparison_leaves_modes_and_statistics_alone():
    model = changed(ReferenceDFN).train()
    model.backbone.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    FusedDFN(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_predictor_computes_the_change():
    image = np.random.default_rng(0).integers(0, 256, (64, 72, 3), np.uint8)
    models = [changed(network, "dilation") for network in (ReferenceDFN, FastDFN)]
    found = [Predictor(model, amp="off").probabilities(image) for model in models]
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], Predictor(changed(FastDFN), amp="off").probabilities(image), atol=1e-3)
