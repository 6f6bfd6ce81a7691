"""The count of operations against PyTorch's own counter, and the floors against those of the design."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.counting import H200, Network, floor, total_flops
from benchmarks.roofline import main
from dfn_fast import ReferenceDFN

SETTINGS = [
    {"backbone": "resnet101"},
    {"backbone": "resnet50", "stem": "conv7", "num_classes": 8, "height": 77, "width": 90, "batch": 2},
    {"backbone": "resnet18", "channels": 64, "border_channels": 9, "height": 96, "width": 64, "batch": 2},
]
NETWORK = ("num_classes", "backbone", "stem", "channels", "border_channels")


def model_of(network: Network) -> ReferenceDFN:
    with torch.device("meta"):
        return ReferenceDFN(**{name: getattr(network, name) for name in NETWORK})


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["backbone"])
def test_inference(settings):
    network = Network(**settings, one_head=False)
    model = model_of(network).eval()
    data = torch.empty(network.batch, 3, network.height, network.width, device="meta")
    assert total_flops(network) == counted(lambda: model(data))
    for i in range(3):
        model.smooth_heads[i] = torch.nn.Identity()  # the last is the one that is read
    assert total_flops(Network(**settings)) == counted(lambda: model(data))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["backbone"])
def test_training(settings):
    network = Network(**{**settings, "batch": 2}, one_head=False, border=True)
    model = model_of(network).train()
    size = (2, network.height, network.width)
    data, labels = torch.empty(2, 3, *size[1:], device="meta"), torch.zeros(size, dtype=torch.long, device="meta")

    def step():
        sum(score.sum() for scores in model.scores(data) for score in scores).backward()

    assert labels.shape == size
    assert total_flops(network, training=True) == counted(step)


@pytest.mark.parametrize("training", [False, True])
def test_the_designs_arithmetic(training):
    """In 10^12: 9.0 and 8.0 with savings for inference at batch 16, 53.7 and 48.9 for training at batch 32."""
    settings = {"batch": 32, "one_head": False, "border": True} if training else {"batch": 16}
    expected = (53.7, 48.9) if training else (9.0, 8.0)
    for savings, figure in zip((False, True), expected, strict=True):
        flops = total_flops(Network(**settings, savings=savings), training)
        assert flops / 1e12 == pytest.approx(figure, rel=0.03)


def test_floors_are_near_the_designs():
    """12.6 ms and 11.1 ms for inference at batch 16 on one H200."""
    assert floor(Network(batch=16), H200) == pytest.approx(12.6e-3, rel=0.1)
    assert floor(Network(batch=16, savings=True), H200) == pytest.approx(11.1e-3, rel=0.1)


def test_the_table_adds_up(capsys):
    assert main(["--backbone", "resnet18", "--size", "64x96", "--training", "--savings"]) == 0
    lines = [line.rsplit(maxsplit=4) for line in capsys.readouterr().out.splitlines()[1:]]
    *parts, whole = [[float(number.rstrip("%")) for number in line[1:]] for line in lines]
    assert lines[-1][0].strip() == "all"
    for column in range(3):
        assert sum(part[column] for part in parts) == pytest.approx(whole[column], abs=0.2)
