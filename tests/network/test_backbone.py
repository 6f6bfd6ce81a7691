"""The backbones: shapes, sizes, and the parameter names and counts of torchvision's and timm's published ResNets."""

import math

import pytest
import torch
from torch import nn

from dfn_fast.network.backbone import ResNet, initialise

DEPTHS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
# torchvision's published totals without the classifier (513,000 after 512 channels, 2,049,000 after 2048).
CONV7_PARAMETERS = {
    "resnet18": 11_689_512 - 513_000,
    "resnet34": 21_797_672 - 513_000,
    "resnet50": 25_557_032 - 2_049_000,
    "resnet101": 44_549_160 - 2_049_000,
    "resnet152": 60_192_808 - 2_049_000,
}


def on_meta(depth, stem="deep"):
    with torch.device("meta"):
        return ResNet(depth, stem)


def norm(name, channels):
    return {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")} | {
        f"{name}.num_batches_tracked": ()
    }


def published_shapes(depth, stem):
    """Names and shapes by torchvision's rule. timm's "s" variants differ only in the stem."""
    bottleneck = depth != "resnet18"
    if stem == "deep":
        shapes = {"conv1.0.weight": (64, 3, 3, 3), "conv1.3.weight": (64, 64, 3, 3), "conv1.6.weight": (128, 64, 3, 3)}
        shapes |= norm("conv1.1", 64) | norm("conv1.4", 64)
    else:
        shapes = {"conv1.weight": (64, 3, 7, 7)}
    channels = 128 if stem == "deep" else 64
    shapes |= norm("bn1", channels)
    for stage, count in enumerate(BLOCKS[depth]):
        width = 64 * 2**stage
        out = width * 4 if bottleneck else width
        for i in range(count):
            block = f"layer{stage + 1}.{i}"
            if bottleneck:
                convs = [(width, channels, 1, 1), (width, width, 3, 3), (out, width, 1, 1)]
            else:
                convs = [(width, channels, 3, 3), (width, width, 3, 3)]
            for number, shape in enumerate(convs, 1):
                shapes[f"{block}.conv{number}.weight"] = shape
                shapes |= norm(f"{block}.bn{number}", shape[0])
            if i == 0 and (stage > 0 or channels != out):
                shapes[f"{block}.downsample.0.weight"] = (out, channels, 1, 1)
                shapes |= norm(f"{block}.downsample.1", out)
            channels = out
    return shapes


@pytest.mark.parametrize("depth", ["resnet18", "resnet50"])
@pytest.mark.parametrize("stem", ["conv7", "deep"])
def test_published_weights_load_by_name_and_shape(depth, stem):
    shapes = published_shapes(depth, stem)
    state = {name: torch.rand(shape) for name, shape in shapes.items()}
    backbone = ResNet(depth, stem)
    backbone.load_state_dict(state, strict=True)
    for name, tensor in backbone.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("depth", DEPTHS)
def test_parameter_counts_are_torchvisions(depth):
    count = sum(p.numel() for p in on_meta(depth, "conv7").parameters())
    assert count == CONV7_PARAMETERS[depth]


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_deep_stem_adds_its_own_parameters_and_nothing_else(depth):
    stem = 3 * 64 * 9 + 64 * 64 * 9 + 64 * 128 * 9 + 2 * (64 + 64 + 128) - (3 * 64 * 49 + 2 * 64)
    if depth in ("resnet18", "resnet34"):
        first_block = 64 * 64 * 9 + 128 * 64 + 2 * 64  # 64 more inputs, and a projection that conv7 does not need
    else:
        first_block = 64 * 64 + 64 * 256  # 64 more inputs in conv1 and in the projection
    count = sum(p.numel() for p in on_meta(depth, "deep").parameters())
    assert count == CONV7_PARAMETERS[depth] + stem + first_block


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("stem", ["conv7", "deep"])
def test_four_maps_at_strides_4_to_32(depth, stem):
    backbone = on_meta(depth, stem)
    maps = backbone(torch.empty(2, 3, 64, 96, device="meta"))
    assert [tuple(m.shape) for m in maps] == [
        (2, channels, 64 // stride, 96 // stride)
        for channels, stride in zip(backbone.channels, (4, 8, 16, 32), strict=True)
    ]
    assert backbone.channels == ((64, 128, 256, 512) if depth in DEPTHS[:2] else (256, 512, 1024, 2048))


@pytest.mark.parametrize("stem", ["conv7", "deep"])
@pytest.mark.parametrize("size", [(33, 47), (32, 32), (65, 40), (1, 1)], ids=str)
def test_sizes_are_rounded_up(stem, size):
    maps = on_meta("resnet18", stem).eval()(torch.empty(1, 3, *size, device="meta"))
    expected = [tuple(math.ceil(side / stride) for side in size) for stride in (4, 8, 16, 32)]
    assert [tuple(m.shape[2:]) for m in maps] == expected


def test_a_bottlenecks_stride_is_on_its_3x3_convolution():
    block = on_meta("resnet50").layer2[0]
    assert [conv.stride for conv in (block.conv1, block.conv2, block.conv3)] == [(1, 1), (2, 2), (1, 1)]


def test_maps_are_finite_and_depend_on_the_image():
    torch.manual_seed(0)
    backbone = ResNet("resnet18", "deep")
    image = torch.randn(2, 3, 64, 64)
    for a, b in zip(backbone(image), backbone(image.flip(3)), strict=True):
        assert torch.isfinite(a).all()
        assert (a - b).abs().max() > 0.1


def test_unknown_depth_and_stem_are_errors_that_name_the_known():
    with pytest.raises(ValueError, match=r"'resnet20' is not known; choose one of resnet18, .*resnet152"):
        ResNet("resnet20")
    with pytest.raises(ValueError, match="'conv3' is not known; choose one of deep, conv7"):
        ResNet("resnet18", "conv3")


def test_the_norm_layer_is_the_one_given():
    with torch.device("meta"):
        backbone = ResNet("resnet50", norm_layer=lambda channels: nn.GroupNorm(8, channels))
    norms = [m for m in backbone.modules() if isinstance(m, nn.GroupNorm | nn.BatchNorm2d)]
    assert len(norms) == 3 + 3 * 16 + 4
    assert all(isinstance(m, nn.GroupNorm) for m in norms)


def test_convolutions_start_from_he_fan_in_and_norm_layers_from_one_and_zero():
    torch.manual_seed(0)
    backbone = ResNet("resnet18", "deep")
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.05), name
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    conv = nn.Conv2d(1, 1, 1)
    initialise(conv)
    assert conv.bias.item() == 0
