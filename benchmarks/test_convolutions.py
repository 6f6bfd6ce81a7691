"""The convolutions that decide the speed, each on its own. The table shows what to do next.

``pytest benchmarks/test_convolutions.py --benchmark-only``. Each distinct convolution of DFN-R101 with more than a
hundredth of the arithmetic, channels_last: forward, gradient of the input, gradient of the weight; then channel counts
that tensor cores like and do not like; convolution with bias and ReLU as two calls and as one; batch norm with ReLU.
Figures are TFLOP/s and the share of the machine's matrix product, measured in the same run. On a GPU at 512 x 512 with
batch 1, 16 and 32, in bf16 and fp16; on a CPU at 128 x 128, batch 1, in float32: :data:`SHORT`, and with ``--full`` all
of them, and bf16 if it has that.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import figures, machine, measure
from benchmarks.harness.counting import Layer, Network, total_flops
from benchmarks.harness.figures import Work
from benchmarks.harness.machine import name_of
from benchmarks.harness.measure import DEVICE
from dfn_kernels import conv3x3
from dfn_kernels.convolution.fused_conv import Packed, fused_conv

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("cudnn_by_trial")]
CPU = DEVICE.type == "cpu"
BATCHES = (1,) if CPU else (1, 16, 32)
SIDE = 128 if CPU else 512
DTYPES = [dtype for dtype in machine.DTYPES if CPU or dtype != torch.float32]
DIRECTIONS = ("forward", "input gradient", "weight gradient")
CHANNELS = [(512, 189), (512, 192), (189, 189), (192, 192), (189, 21), (192, 24), (192, 32), (21, 9), (24, 16)]
# What a short run measures, in float32: convolutions that Winograd's algorithm makes faster, that it does not, and one
# that it cannot take; channels that vector units do not like, and the next ones that they do.
SHORT = ("512-512 3x3 32x32", "189-189 3x3 32x32", "512-512 1x1 32x32"), ((189, 189), (192, 192))
FULL = [pytest.mark.full]
BY_DTYPE = [pytest.param(dtype, id=name_of(dtype), marks=[] if dtype == torch.float32 else FULL) for dtype in DTYPES]


def layers() -> list[Layer]:
    """The distinct layers, those with the most arithmetic first; a pixel count is that of one image."""
    network = Network(height=SIDE, width=SIDE, one_head=False)
    work: dict[tuple[int, ...], int] = {}
    by_shape: dict[tuple[int, ...], Layer] = {}
    for layer in network.layers():
        shape = (layer.inputs, layer.outputs, layer.kernel, layer.pixels_in, layer.pixels_out)
        work[shape] = work.get(shape, 0) + layer.flops
        by_shape.setdefault(shape, layer)
    least = total_flops(network) / 100
    return [by_shape[shape] for shape in sorted(work, key=lambda s: -work[s]) if work[shape] > least]


def title_of(layer: Layer) -> str:
    side = round(layer.pixels_out**0.5)
    return f"{layer.inputs}-{layer.outputs} {layer.kernel}x{layer.kernel} {side}x{side}"


def tensors(
    channels: tuple[int, int], kernel: int, side_in: int, batch: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    inputs, outputs = channels
    torch.manual_seed(0)
    x = torch.randn(batch, inputs, side_in, side_in, device=DEVICE).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, kernel, kernel, device=DEVICE) / (inputs * kernel**2) ** 0.5
    return x, weight.to(dtype, memory_format=torch.channels_last)


def timed(calls: dict[str, Callable[[], Any]], benchmark: Any, main: str) -> dict[str, list[float]]:
    """Seconds of the calls, in turns; pytest-benchmark times the one named ``main``."""
    seconds = measure.alternate(calls, measure.rounds_for(calls[main], budget=0.5, least=5, most=50))
    benchmark.pedantic(lambda: (calls[main](), measure.synchronize()), rounds=3, iterations=1)
    return seconds


def cases() -> Iterator[Any]:
    for dtype in DTYPES:
        for batch in BATCHES:
            for layer in layers():
                for direction in DIRECTIONS:
                    name = f"{title_of(layer)} batch {batch} {name_of(dtype)} {direction}"
                    marks = [] if title_of(layer) in SHORT[0] and dtype == torch.float32 else FULL
                    yield pytest.param(layer, batch, dtype, direction, name, id=name.replace(" ", "-"), marks=marks)


@pytest.mark.parametrize(("layer", "batch", "dtype", "direction", "name"), [*cases()])
def test_convolution(layer, batch, dtype, direction, name, benchmark, notes):
    side_in, side_out = (round(pixels**0.5) for pixels in (layer.pixels_in, layer.pixels_out))
    stride, padding = side_in // side_out, layer.kernel // 2
    x, weight = tensors((layer.inputs, layer.outputs), layer.kernel, side_in, batch, dtype)
    d_out = torch.randn_like(F.conv2d(x, weight, None, stride, padding))
    wanted = [direction == "input gradient", direction == "weight gradient", False]
    calls: dict[str, Callable[[], Any]] = {"library": lambda: F.conv2d(x, weight, None, stride, padding)}
    if direction != "forward":
        steps, pads = [stride, stride], [padding, padding]
        backward = torch.ops.aten.convolution_backward
        calls["library"] = lambda: backward(d_out, x, weight, None, steps, pads, [1, 1], False, [0, 0], 1, wanted)
    if layer.kernel == 3 and stride == 1:
        calls["ours"] = functools.partial(conv3x3, x, weight)
        if direction != "forward":
            a, b = x.clone().requires_grad_(wanted[0]), weight.clone().requires_grad_(wanted[1])
            out = conv3x3(a, b)
            calls["ours"] = lambda: torch.autograd.grad(out, a if wanted[0] else b, d_out, retain_graph=True)
    benchmark.group = name
    seconds = timed(calls, benchmark, "library")
    work = Work(layer.bytes(dtype.itemsize) * batch, layer.flops * batch, dtype)
    info = {"layer": f"{title_of(layer)} batch {batch} {name_of(dtype)}", "direction": direction}
    benchmark.extra_info.update(info | figures.figures(seconds["library"], work))
    note = f"{name}: {1e3 * benchmark.extra_info['tflop_per_s']:.0f} GFLOP/s"
    note += f", {benchmark.extra_info['share_of_product']:.0%} of a matrix product"
    if "ours" in seconds:
        speed_up = 1 / measure.median_ratio(seconds["ours"], seconds["library"])
        benchmark.extra_info.update(
            {"ours_ms": figures.spread(seconds["ours"])["median_ms"], "ours_speed_up": speed_up}
        )
        note += f"; ours {speed_up:.2f} x"
    notes.append(note)


@pytest.mark.parametrize(
    "channels", [pytest.param(c, id=f"{c[0]}-{c[1]}", marks=[] if c in SHORT[1] else FULL) for c in CHANNELS]
)
@pytest.mark.parametrize("dtype", BY_DTYPE)
def test_channel_counts(channels, dtype, benchmark, notes):
    """189 against 192, 21 against 24 and 32, 9 against 16: 3x3, at stride 4."""
    x, weight = tensors(channels, 3, SIDE // 4, BATCHES[-1], dtype)
    benchmark.group = f"channels {channels[0]}-{channels[1]} {name_of(dtype)}"
    seconds = timed({"library": lambda: F.conv2d(x, weight, padding=1)}, benchmark, "library")["library"]
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    moved = x.nbytes + weight.nbytes + pixels * channels[1] * dtype.itemsize
    found = figures.figures(seconds, Work(moved, 2 * 9 * channels[0] * channels[1] * pixels, dtype))
    benchmark.extra_info.update(found)
    notes.append(f"{benchmark.group}: {found['median_ms']:.3f} ms, {1e3 * found['tflop_per_s']:.0f} GFLOP/s")


@pytest.mark.parametrize("residual", [pytest.param(False, id="plain"), pytest.param(True, id="residual", marks=FULL)])
@pytest.mark.parametrize("dtype", BY_DTYPE)
def test_bias_and_relu(residual, dtype, benchmark, notes):
    """Convolution and pointwise steps as separate calls, and as one of the library's; with memory full of nan."""
    x, weight = tensors((256, 256), 3, SIDE // 16, BATCHES[-1], dtype)
    bias = torch.randn(256, device=DEVICE).to(dtype)
    addend = torch.randn_like(x) if residual else None

    def separate() -> Tensor:
        out = F.conv2d(x, weight, bias, padding=1)
        return F.relu_(out if addend is None else out.add_(addend))

    packed = Packed()
    calls = {"separate": separate, "ours": lambda: fused_conv(x, weight, bias, addend, padding=1, packed=packed)}
    junk = [torch.full_like(x, float("nan")) for _ in range(4)]
    del junk
    torch.testing.assert_close(calls["ours"](), calls["separate"](), rtol=0.05, atol=0.05)
    benchmark.group = f"bias, ReLU{', residual' if residual else ''} in one call, {name_of(dtype)}"
    seconds = timed(calls, benchmark, "ours")
    speed_up = 1 / measure.median_ratio(seconds["ours"], seconds["separate"])
    benchmark.extra_info.update(figures.spread(seconds["ours"]) | {"speed_up": speed_up})
    notes.append(f"{benchmark.group}: {speed_up:.2f} x as fast as separate calls")


@pytest.mark.parametrize("dtype", BY_DTYPE)
def test_batch_norm_and_relu(dtype, benchmark, notes):
    """Training's batch norm and ReLU, forward and backward: eager, and compiled. cuDNN's own serves only float16."""
    x = torch.randn(BATCHES[-1] + 1, 256, SIDE // 4, SIDE // 4, device=DEVICE)
    x = x.to(dtype, memory_format=torch.channels_last).requires_grad_()
    norm = torch.nn.BatchNorm2d(256).to(DEVICE)
    d_out = torch.randn_like(x)

    def step(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(x), [x, *norm.parameters()], d_out)

    def forward(x: Tensor) -> Tensor:
        return F.relu(norm(x))

    compiled = torch.compile(forward)
    calls = {"eager": lambda: step(forward), "compiled": lambda: step(compiled)}
    benchmark.group = f"batch norm and ReLU compiled, {name_of(dtype)}"
    seconds = timed(calls, benchmark, "compiled")
    speed_up = 1 / measure.median_ratio(seconds["compiled"], seconds["eager"])
    moved = 5 * x.nbytes  # x twice and out; its gradient and x for the gradient of x, at the least
    found = figures.figures(seconds["compiled"], Work(moved, 8 * x.numel(), torch.float32))
    benchmark.extra_info.update(found | {"speed_up": speed_up})
    notes.append(f"{benchmark.group}: {speed_up:.2f} x as fast as eager, {found['gb_per_s']:.1f} GB/s")


@pytest.mark.skipif(CPU, reason="only cuDNN has this choice")
@pytest.mark.parametrize("batch", BATCHES)
def test_choice_of_algorithms(batch, benchmark, notes):
    """The table's convolutions in bf16, one after the other, with cuDNN's algorithms found by trial, as in training,
    and by its rules, as in inference."""
    calls = []
    for layer in layers():
        side_in, side_out = (round(pixels**0.5) for pixels in (layer.pixels_in, layer.pixels_out))
        x, weight = tensors((layer.inputs, layer.outputs), layer.kernel, side_in, batch, torch.bfloat16)
        calls.append(functools.partial(F.conv2d, x, weight, None, side_in // side_out, layer.kernel // 2))

    def all_of_them(by_trial: bool) -> None:
        torch.backends.cudnn.benchmark = by_trial
        for call in calls:
            call()

    choices = {name: functools.partial(all_of_them, by_trial) for name, by_trial in (("rules", False), ("trial", True))}
    benchmark.group = f"cuDNN's algorithms by trial, batch {batch}"
    seconds = timed(choices, benchmark, "trial")
    torch.backends.cudnn.benchmark = True
    speed_up = 1 / measure.median_ratio(seconds["trial"], seconds["rules"])
    benchmark.extra_info.update(figures.spread(seconds["trial"]) | {"speed_up": speed_up})
    notes.append(f"{benchmark.group}: {speed_up:.2f} x as fast as by its rules")
