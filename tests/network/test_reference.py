"""ReferenceDFN: its names, shapes and counts, its forward pass and loss against a second transcription, its ablations,
and compatibility with programs written for the authors' ``DFN``."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfn_fast.network.reference import ReferenceDFN
from support.networks import (
    ABLATIONS,
    SMALL,
    VARIANT_NAMES,
    VARIANTS,
    batch,
    narrow_backbones,
    published_backbones,
    random_dfn,
)
from support.transcription import Transcription


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """Narrows the backbones: the published ResNet-18 and 50 would take most of the time."""
    with narrow_backbones():
        yield


# Names, shapes, counts


def rrb(name, inputs, outputs):
    shapes = {f"{name}.conv_1x1.weight": (outputs, inputs, 1, 1)}
    shapes |= {f"{name}.{conv}.weight": (outputs, outputs, 3, 3) for conv in ("cbr.conv", "conv_refine")}
    return shapes | norm(f"{name}.cbr.bn", outputs)


def norm(name, channels):
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in parts} | {f"{name}.num_batches_tracked": ()}


def published_shapes(num_classes, channels, border_channels, stages):
    """Names and shapes in the authors' checkpoints outside the backbone, whose stages have ``stages`` channels."""
    shapes = {"global_context.1.conv.weight": (channels, stages[3], 1, 1)} | norm("global_context.1.bn", channels)
    for i in range(4):
        shapes |= rrb(f"smooth_pre_rrbs.{i}", stages[3 - i], channels)
        gate = f"cabs.{i}.channel_attention.fc"
        shapes |= {f"{gate}.0.weight": (channels, 2 * channels), f"{gate}.0.bias": (channels,)}
        shapes |= {f"{gate}.2.weight": (channels, channels), f"{gate}.2.bias": (channels,)}
        shapes |= rrb(f"smooth_aft_rrbs.{i}", channels, channels)
        shapes |= rrb(f"border_pre_rrbs.{i}", stages[i], border_channels)
        shapes |= rrb(f"border_aft_rrbs.{i}", border_channels, border_channels)
        for head, inputs, scores in (("smooth", channels, num_classes), ("border", border_channels, 1)):
            shapes |= rrb(f"{head}_heads.{i}.rrb", inputs, 9 * scores)
            shapes[f"{head}_heads.{i}.conv.weight"] = (scores, 9 * scores, 1, 1)
            shapes[f"{head}_heads.{i}.conv.bias"] = (scores,)
    return shapes


@pytest.fixture(scope="module")
def published():
    """DFN-R101 with 21 classes on the meta device."""
    with torch.device("meta"):
        return ReferenceDFN(21)


def test_the_published_network_has_the_published_size(published):
    assert len(published.state_dict()) == 866
    assert sum(p.numel() for p in published.parameters()) == 90_724_344


def test_names_and_shapes_are_the_published_ones(published):
    shapes = {name: tuple(t.shape) for name, t in published.state_dict().items()}
    backbone = {n: shapes.pop(n) for n in list(shapes) if n.startswith("backbone.")}
    assert shapes == published_shapes(21, 512, 21, (256, 512, 1024, 2048))
    layers = {n.split(".")[1] for n in backbone}
    assert layers == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    assert backbone["backbone.conv1.6.weight"] == (128, 64, 3, 3)
    assert backbone["backbone.layer3.22.conv3.weight"] == (1024, 256, 1, 1)
    assert backbone["backbone.layer1.0.downsample.0.weight"] == (256, 128, 1, 1)


def rrb_parameters(inputs, outputs):
    return inputs * outputs + 18 * outputs**2 + 2 * outputs


def test_each_ablation_has_the_parameters_of_its_parts():
    """DFN-R101 with 21 classes. The backbone is torchvision's 42,500,160, with the deep stem's 137,088 instead of 9,536
    and 20,480 for 64 more inputs to the first block."""
    stages, c, k, b = (256, 512, 1024, 2048), 512, 21, 21
    backbone = 42_500_160 + (9 * (3 * 64 + 64 * 64 + 64 * 128) + 2 * 256 + 64 * 64 + 64 * 256) - (49 * 3 * 64 + 128)
    head = rrb_parameters(c, 9 * k) + 9 * k * k + k
    border_head = rrb_parameters(b, 9) + 9 + 1
    parts = {
        "RRB only": backbone + sum(rrb_parameters(s, c) for s in stages) + 4 * rrb_parameters(c, c) + head,
        "+ global pooling": 2048 * c + 2 * c,
        "+ CAB": 4 * (2 * c * c + c + c * c + c),
        "+ deep supervision": 3 * head,
        "+ border network": sum(rrb_parameters(s, b) for s in stages) + 4 * rrb_parameters(b, b) + 4 * border_head,
    }
    expected = itertools.accumulate(parts.values())
    with torch.device("meta"):
        for (row, switches), count in zip(ABLATIONS.items(), expected, strict=True):
            assert sum(p.numel() for p in ReferenceDFN(21, **switches).parameters()) == count, row
    assert count == 90_724_344


# The forward pass and the loss


@pytest.mark.parametrize(("settings", "size"), VARIANTS, ids=VARIANT_NAMES)
def test_log_probabilities_match_a_second_transcription(settings, size):
    with published_backbones():
        model = random_dfn(**settings).eval()
    image, _, _ = batch(size)
    with torch.no_grad():
        result = model(image)
        smooth, _ = Transcription(model.state_dict(), training=False).scores(image)
    assert result.shape == (2, 5, *size)
    torch.testing.assert_close(result, F.log_softmax(smooth[3], 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("settings", "size"), VARIANTS, ids=VARIANT_NAMES)
def test_the_loss_matches_a_second_transcription(settings, size):
    model = random_dfn(alpha=0.75, **settings).train()
    image, labels, borders = batch(size, count=3)
    with torch.no_grad():
        expected = Transcription(model.state_dict(), training=True).loss(image, labels, borders, weight=0.75)
        torch.testing.assert_close(model(image, labels, borders), expected, rtol=1e-10, atol=1e-10)


def test_scores_come_from_the_highest_stage_to_the_lowest_and_borders_the_other_way():
    model = random_dfn().eval()
    image, _, _ = batch((33, 47))
    with torch.no_grad():
        result = model.scores(image)
        smooth, border = Transcription(model.state_dict(), training=False).scores(image)
    torch.testing.assert_close(result.smooth, list(smooth.values()), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.border, list(border.values()), rtol=1e-10, atol=1e-10)


# Gradients and bad input


@pytest.mark.parametrize("switches", ABLATIONS.values(), ids=ABLATIONS)
def test_a_step_reaches_every_parameter_but_the_unused_ones_and_lowers_the_loss(switches):
    model = random_dfn(**switches).train()
    data = batch((40, 48), count=3)
    loss = model(*data)
    loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("border_aft_rrbs.0."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    assert model(*data) < loss


def test_a_batch_of_one_trains_only_without_batch_norm_after_pooling():
    data = batch((64, 64), count=1)
    model = random_dfn()
    with pytest.raises(ValueError, match=r"batch of one.*batch of two or more"):
        model(*data)
    assert torch.isfinite(model.eval()(data[0])).all()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert torch.isfinite(model(*data))
    assert torch.isfinite(random_dfn(global_context=False)(*data))


@pytest.mark.parametrize("shape", [(2, 3, 31, 64), (2, 3, 64, 31), (2, 1, 64, 64), (3, 64, 64)], ids=str)
def test_an_image_that_is_too_small_or_not_rgb_is_an_error(shape):
    with torch.device("meta"):
        model = ReferenceDFN(5, **SMALL)
    with pytest.raises(ValueError, match=r"H and W of at least 32, got \["):
        model(torch.empty(shape, device="meta"))


# As a replacement for the authors' DFN


class Recorder(nn.Module):
    """A criterion that has its own parameter and records its inputs."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, scores, labels):
        self.seen.append((tuple(scores.shape), labels))
        return scores.mean() * self.temperature


def test_criteria_that_are_given_see_full_size_scores_and_the_labels_as_they_are():
    criterion, aux_criterion = Recorder(), Recorder()
    model = ReferenceDFN(5, criterion, aux_criterion, 0.3, None, nn.BatchNorm2d, **SMALL)
    image, labels, borders = batch((40, 50))
    loss = model(image.float(), labels, borders)
    assert [shape for shape, _ in criterion.seen] == [(2, 5, 40, 50)] * 4
    assert [shape for shape, _ in aux_criterion.seen] == [(2, 1, 40, 50)] * 4
    assert all(seen is labels for _, seen in criterion.seen)
    assert all(seen is borders for _, seen in aux_criterion.seen)
    assert loss.shape == ()
    for module in model.business_layer:
        assert module not in (criterion, aux_criterion)


def test_optimisers_that_sort_parameters_by_module_type_find_each_once():
    """In the authors' recipe, weights of convolutions and linear layers decay; biases and norm layers do not."""
    model = ReferenceDFN(5, nn.CrossEntropyLoss(ignore_index=255), norm_layer=nn.BatchNorm2d, **SMALL)
    assert isinstance(model.backbone, nn.Module)
    assert isinstance(model.business_layer, list)
    decay, no_decay = [], []
    for module in (m for top in (model.backbone, *model.business_layer) for m in top.modules()):
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            decay.append(module.weight)
            no_decay += [] if module.bias is None else [module.bias]
        elif isinstance(module, nn.BatchNorm2d):
            no_decay += [module.weight, module.bias]
    found = [id(p) for p in decay + no_decay]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters()}


def test_a_copy_is_equal_and_independent():
    model = random_dfn().eval()
    image, _, _ = batch((33, 47))
    twin = copy.deepcopy(model)
    before = model(image)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(model(image), before)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(image), before)


def test_syncbatchnorm_takes_the_place_of_batchnorm():
    """Same names, same numbers. A batch of one is accepted, because other processes may have more."""
    plain, sync = random_dfn().eval(), random_dfn(norm_layer=nn.SyncBatchNorm).eval()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in sync.modules())
    sync.load_state_dict(plain.state_dict())
    image, _, _ = batch((33, 47), count=1)
    torch.testing.assert_close(sync(image), plain(image), rtol=1e-10, atol=1e-10)
    assert len(sync.train().stages(image)) == 4


@pytest.mark.slow
def test_one_graph_compiles_and_equals_eager():
    with narrow_backbones(resnet18=1):
        model = random_dfn()
    data = batch((33, 47), count=3)
    eager, compiled = copy.deepcopy(model), torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = [network(*data) for network in (compiled, eager)]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)
    for loss in losses:
        loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        if not name.startswith("border_aft_rrbs.0."):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(data[0]), eager.eval()(data[0]), rtol=1e-10, atol=1e-10)
