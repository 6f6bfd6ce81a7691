"""upsample_focal_loss: against the definition in float64, against RetinaNet's formula, and at the ends of the range."""

from functools import partial
from math import isqrt, log1p

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase
from hypothesis import strategies as st
from torch import Tensor, nn

from dfn_kernels import tuning
from dfn_kernels.common.triton_or_stub import tl
from dfn_kernels.losses import upsample_loss_triton as kernels
from dfn_kernels.losses.focal_loss import upsample_focal_loss, upsample_focal_loss_ref
from support import layouts
from support.addresses import offsets_of_program
from support.allocations import Allocations
from support.loss_problems import LAYOUTS, gradient, in_layouts, labels_in_layout, logits_in_layout
from support.parity import DEVICE, DTYPES, assert_no_worse_than, random_like
from support.tiers import each_with_one_dtype, examples, slow

# B, C, the small size, the full size. Rows and the columns between two small columns cost time in the interpreter;
# width and channels do not.
SHAPES = [
    (1, 1, 1, 1, 1, 1),  # one element
    (2, 1, 1, 1, 3, 5),  # one small pixel for all
    (2, 3, 3, 4, 7, 9),  # all odd, a factor that is no integer, two images, targets for each channel
    (1, 1, 2, 32, 5, 125),  # the network's one channel, exactly its factor, 4, and exactly one tile of columns
    (1, 1, 9, 34, 10, 35),  # two columns past a tile, more small rows than one program walks down
    (1, 33, 3, 6, 3, 6),  # same size; one channel past a power of two, two columns past its tile
    (1, 2, 7, 9, 3, 4),  # smaller: small rows and columns with no pixel between them
    (1, 1, 2, 3, 1, 1),  # to a single pixel
    (1, 1, 2, 5, 34, 9),  # a large factor: the rows between two small ones are shared by programs
]
# A failure is small as it is, and making it smaller takes minutes in the interpreter.
WITHOUT_SHRINKING = {"phases": [Phase.generate]}
OPERATOR = torch.ops.dfn_kernels.upsample_focal_loss.default


def make_inputs(shape, dtype=torch.float32, ignored=0.2, scale=3.0) -> tuple[Tensor, Tensor]:
    """Logits and targets, [B, H, W] for one channel and [B, C, H, W] for several."""
    B, C, h, w, H, W = shape
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(B, C, h, w, generator=generator)
    targets = torch.randint(2, (B, H, W) if C == 1 else (B, C, H, W), generator=generator, dtype=torch.uint8)
    targets[torch.rand(targets.shape, generator=generator) < ignored] = 255
    targets.view(-1)[0] = 1  # at least one is valid
    return logits.to(DEVICE, dtype, memory_format=torch.channels_last), targets.to(DEVICE)


def retinanet(z: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """Lin et al., ICCV 2017, eq. 5, of each pixel, in the form that is published with RetinaNet's networks."""
    y = (targets == 1).to(z.dtype)
    p = z.sigmoid()
    p_t = p * y + (1 - p) * (1 - y)
    alpha_t = alpha * y + (1 - alpha) * (1 - y)
    return alpha_t * (1 - p_t) ** gamma * F.binary_cross_entropy_with_logits(z, y, reduction="none")


@pytest.mark.parametrize(("shape", "dtype"), each_with_one_dtype(SHAPES, DTYPES))
def test_matches_the_definition(backend, shape, dtype):
    assert_no_worse_than(upsample_focal_loss_ref, upsample_focal_loss, make_inputs(shape, dtype))


@pytest.mark.parametrize("reduction", ["mean", pytest.param("sum", marks=slow), "none"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_matches_the_definition_at_every_setting(backend, alpha, gamma, reduction):
    fns = (
        partial(fn, alpha=alpha, gamma=gamma, reduction=reduction)
        for fn in (upsample_focal_loss_ref, upsample_focal_loss)
    )
    assert_no_worse_than(*fns, make_inputs((1, 2, 2, 4, 4, 9)))


@pytest.mark.parametrize("shape", SHAPES[2:4], ids=str)
def test_bfloat16_without_a_gpu(monkeypatch, shape):
    """The CPU path; the interpreter has no bfloat16 to compare with."""
    monkeypatch.setenv("DFN_KERNELS", "torch")
    inputs = [x.cpu() for x in make_inputs(shape, torch.bfloat16)]
    assert_no_worse_than(upsample_focal_loss_ref, upsample_focal_loss, inputs)


@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("ignore_index", [255, 0, 1, -100])
def test_target_dtypes_and_ignored_values(backend, target_dtype, ignore_index):
    logits, targets = make_inputs((1, 1, 2, 3, 4, 5))
    targets = targets.to(target_dtype)
    if target_dtype != torch.uint8:
        targets[targets == 255] = ignore_index
    for ours, expected in zip(
        gradient(upsample_focal_loss, logits, targets, ignore_index=ignore_index),
        gradient(upsample_focal_loss_ref, logits, targets, ignore_index=ignore_index), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), pytest.param(0.25, 0.0, marks=slow), (0.9, 0.5)])
def test_agrees_with_retinanet(backend, alpha, gamma):
    """The definition itself is held against the published formula: border is the class that alpha weighs."""

    def published(logits: Tensor, targets: Tensor) -> Tensor:
        z = F.interpolate(logits, size=targets.shape[-2:], mode="bilinear", align_corners=True)
        z = z.reshape(targets.shape)[targets != 255]
        return retinanet(z, targets[targets != 255], alpha, gamma).mean()

    for channels in (1, 3):
        inputs = make_inputs((2, channels, 2, 4, 4, 9), torch.float64)
        expected = gradient(published, *inputs)
        for fn in (upsample_focal_loss_ref, upsample_focal_loss):
            for a, b in zip(gradient(fn, *inputs, alpha=alpha, gamma=gamma), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_loss_is_what_it_says(backend):
    """By hand: a pixel at logit 0 costs alpha_t / 4 * log(2), never less than nothing."""
    logits, targets = torch.zeros(1, 1, 1, 1, device=DEVICE), torch.tensor([[[1, 0, 255]]], device=DEVICE)
    loss = upsample_focal_loss(logits, targets, reduction="none")
    assert loss.flatten().tolist() == pytest.approx([0.25 * log1p(1) / 4, 0.75 * log1p(1) / 4, 0])
    assert upsample_focal_loss(logits, targets).item() == pytest.approx(0.5 * log1p(1) / 4)


def test_targets_of_one_channel_may_have_it(backend):
    logits, targets = make_inputs((2, 1, 2, 2, 2, 3))
    for reduction in ("mean", "none"):
        flat = gradient(upsample_focal_loss, logits, targets, reduction=reduction)
        ours = gradient(upsample_focal_loss, logits, targets[:, None], reduction=reduction)
        assert ours[0].shape == (targets[:, None].shape if reduction == "none" else ())
        assert torch.equal(ours[0].reshape(flat[0].shape), flat[0])
        assert torch.equal(ours[1], flat[1])


def test_256_channels(backend):
    inputs = make_inputs((1, 256, 2, 3, 3, 4))
    assert_no_worse_than(upsample_focal_loss_ref, upsample_focal_loss, inputs)


@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=slow if x in ("sliced", "expanded") else []) for x in LAYOUTS]
)
def test_layouts_change_no_bit(backend, layout):
    """Of logits and targets, with one channel, which is read where it lies, and with several."""
    for channels in (1, 3):
        logits, targets = make_inputs((2, channels, 2, 3, 2, 4))
        inputs = logits_in_layout(logits, layout), labels_in_layout(targets, layout)
        same = (x.clone(memory_format=torch.contiguous_format) for x in inputs)
        for ours, expected in zip(
            gradient(upsample_focal_loss, *inputs), gradient(upsample_focal_loss, *same), strict=True
        ):
            assert torch.equal(ours, expected)


def test_gradient_of_each_pixel_may_be_expanded(backend):
    """As that of a sum, or of a mean over rows, is."""
    logits, targets = make_inputs((1, 1, 2, 3, 3, 4))
    x, y = (logits.clone().requires_grad_() for _ in range(2))
    upsample_focal_loss(x, targets, reduction="none").sum().backward()
    upsample_focal_loss(y, targets, reduction="sum").backward()
    torch.testing.assert_close(x.grad, y.grad)


@examples(3, 10, WITHOUT_SHRINKING, data=st.data())
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_any_shape_dtype_and_layout(name, data):
    small, rows = st.integers(1, 3), st.integers(1, 4)
    # Of one or two pixels PyTorch may by chance have no error at all, which is not a bound; SHAPES has narrow images.
    shape = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 5), small, small, rows, st.integers(4, 6)))
    logits, targets = make_inputs(shape, data.draw(st.sampled_from(DTYPES)))
    if shape[1] == 1 and data.draw(st.booleans()):
        targets = targets[:, None]
    targets = targets.to(data.draw(st.sampled_from([torch.uint8, torch.int32, torch.int64])))
    chosen = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(2)]
    d_loss = data.draw(st.sampled_from([None, *layouts.LAYOUTS]))
    ref, ours = (
        in_layouts(partial(fn, reduction="mean" if d_loss is None else "none"), *chosen, d_loss)
        for fn in (upsample_focal_loss_ref, upsample_focal_loss)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFN_KERNELS", name)
        assert_no_worse_than(ref, ours, (logits, targets))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_has_the_logits_dtype_and_is_channels_last(backend, reduction):
    for dtype in (torch.float16, torch.float32, torch.float64):
        logits, targets = make_inputs((1, 3, 2, 3, 2, 4), dtype)
        loss, d_logits = gradient(upsample_focal_loss, logits.contiguous(), targets, reduction=reduction)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert d_logits.dtype == dtype
        assert d_logits.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(1, 1, 3, 4, 3, 4), (1, 2, 2, 3, 3, 5)], ids=str)
def test_inputs_are_left_alone(backend, shape):
    """At the same size and in float32 the small logits themselves could be taken for the resized ones."""
    logits, targets = make_inputs(shape)
    before = logits.clone(), targets.clone()
    gradient(upsample_focal_loss, logits, targets)
    assert torch.equal(logits, before[0])
    assert torch.equal(targets, before[1])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_any_finite_half_gives_the_right_loss(backend, gamma):
    """From the largest number that a half can hold to the smallest, on the right and on the wrong side."""
    values = [65504.0, -65504.0, 2000.0, -2000.0, 90.0, -90.0, 17.0, -17.0, 2**-24, -(2**-24), 0.0, -0.0]
    logits = torch.tensor([values, values], dtype=torch.float16, device=DEVICE).view(1, 1, 2, -1)
    targets = torch.tensor([[[1], [0]]], device=DEVICE).expand(1, 2, len(values))
    ours = gradient(upsample_focal_loss, logits, targets, gamma=gamma, reduction="none")
    z = torch.where(targets == 1, logits[:, 0], -logits[:, 0]).double()  # logit of the true side
    alpha_t, nll, p, q = torch.where(targets == 1, 0.25, 0.75), F.softplus(-z, threshold=700), z.sigmoid(), -z
    q = q.sigmoid()
    d_z = -alpha_t * q**gamma * (gamma * p * nll + q) * torch.where(targets == 1, 1, -1) * random_like(ours[0])
    torch.testing.assert_close(ours[0].double(), alpha_t * q**gamma * nll, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(ours[1].double(), d_z[:, None], rtol=1e-3, atol=2**-24)
    assert ours[0].isfinite().all()  # written out: 65504 on the wrong side costs alpha_t * 65504
    assert ours[0][0, 0, 1].item() == 0.25 * 65504
    assert ours[0][0, 1, 0].item() == 0.75 * 65504


@examples(
    3,
    10,
    WITHOUT_SHRINKING,
    bits=st.lists(st.integers(-0x7BFF, 0x7BFF), min_size=6, max_size=6),
    gamma=st.sampled_from([0.0, 0.5, 2.0]),
    reduction=st.sampled_from(["mean", "none"]),
)
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_any_finite_half_is_finite_when_resized(name, bits, gamma, reduction):
    bits = torch.tensor(bits, dtype=torch.int16, device=DEVICE)
    logits = (bits.abs().view(torch.float16) * bits.sign()).view(1, 1, 2, 3)
    targets = make_inputs((1, 1, 2, 3, 3, 5))[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFN_KERNELS", name)
        loss, d_logits = gradient(upsample_focal_loss, logits, targets, gamma=gamma, reduction=reduction)
    expected = upsample_focal_loss_ref(logits.double(), targets, gamma=gamma, reduction=reduction)
    # Where large logits nearly cancel in the resize, their rounding is the error.
    slack = 1e-6 * (logits.double().abs().max().item() + 1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=slack)
    assert d_logits.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", pytest.param("sum", marks=slow), "none"])
def test_no_valid_pixel_gives_zero(backend, reduction):
    for channels in (1, 3):
        logits, targets = make_inputs((2, channels, 2, 2, 3, 4))
        loss, d_logits = gradient(upsample_focal_loss, logits, torch.full_like(targets, 255), reduction=reduction)
        assert loss.eq(0).all()
        assert d_logits.eq(0).all()


def test_a_large_factor_of_the_loss_reaches_the_gradient(backend):
    """As gradient scaling does; and two losses add up in ``grad``."""
    logits, targets = make_inputs((1, 1, 2, 3, 4, 5))
    expected = gradient(upsample_focal_loss_ref, logits, targets)[1]
    x = logits.requires_grad_()
    for _ in range(2):
        loss = upsample_focal_loss(x, targets)
        (loss * 1024).backward(random_like(loss))
    torch.testing.assert_close(x.grad, expected * 2048)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_gradients_of_a_mean_do_not_underflow(backend, reduction):
    """Pixels that are nearly certain: what a scaled loss restores must not be lost before it is scaled."""
    targets, scale = torch.ones(1, 3, 40, dtype=torch.uint8, device=DEVICE), 2.0**14
    logits = 4 + make_inputs((1, 1, 3, 40, 3, 40), torch.float16, scale=0.1)[0]

    def scaled(fn, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        loss = fn(x, targets, reduction=reduction)
        ((loss if reduction == "mean" else loss.mean()) * scale).backward()
        return x.grad.double()

    expected = scaled(upsample_focal_loss_ref, logits.double())
    assert (expected / scale).abs().max() < 8 * 2**-24  # the steps of a half down there
    torch.testing.assert_close(scaled(upsample_focal_loss, logits), expected, rtol=1e-3, atol=0)


def test_without_gradients(backend):
    logits, targets = make_inputs((1, 1, 2, 3, 4, 5))
    expected = upsample_focal_loss_ref(logits, targets)
    torch.testing.assert_close(upsample_focal_loss(logits, targets), expected)
    with torch.no_grad():
        torch.testing.assert_close(upsample_focal_loss(logits.requires_grad_(), targets), expected)


def test_targets_out_of_range(backend, monkeypatch):
    logits, targets = make_inputs((1, 1, 2, 3, 4, 5))
    targets = targets.int()
    wrong, ignored = targets.clone(), targets.clone()
    wrong[0, 1, :3] = torch.tensor([2, -1, 2**31 - 1], dtype=torch.int32)
    ignored[0, 1, :3] = 255
    for ours, expected in zip(
        gradient(upsample_focal_loss, logits, wrong), gradient(upsample_focal_loss, logits, ignored), strict=True
    ):
        assert torch.equal(ours, expected)
    monkeypatch.setenv("DFN_KERNELS_DEBUG", "1")
    upsample_focal_loss(logits, ignored)
    with pytest.raises(ValueError, match=r"upsample_focal_loss expects labels in 0 \.\.\. 1 or 255.*got 2"):
        upsample_focal_loss(logits, wrong)


@pytest.mark.parametrize(
    ("factor", "small"),
    [(4, (4, 64)), pytest.param(9, (2, 9), marks=slow), pytest.param(2, (8, 64), marks=slow)],
    ids=["x4", "x9", "x2"],
)
def test_kernels_hold_nothing_of_full_size(triton_backend, factor, small):
    h, w = small
    logits, targets = make_inputs((1, 1, h, w, factor * (h - 1) + 1, factor * (w - 1) + 1))
    made = Allocations(lambda: gradient(upsample_focal_loss, logits, targets))
    assert made.largest < targets.numel() * 4  # sums of the gradient, in rows that are padded: more than the logits
    assert made.peak < 8 * logits.nbytes + 1024


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU path")
def test_memory_is_below_a_third_of_pytorchs(monkeypatch):
    """At the network's border scores of 512 x 512, batch 4."""
    monkeypatch.setenv("DFN_KERNELS", "torch")
    torch.use_deterministic_algorithms(False)  # filling megabytes with NaN again and again takes its time
    inputs = make_inputs((4, 1, 128, 128, 512, 512))
    ours, eager = (
        Allocations(lambda fn=fn: gradient(fn, *inputs)) for fn in (upsample_focal_loss, upsample_focal_loss_ref)
    )
    assert ours.peak < eager.peak / 3
    assert ours.peak < inputs[1].numel() * 4  # less than one full-size tensor, in fact


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits_every_time(backend, reduction):
    torch.use_deterministic_algorithms(True)  # an error from here on
    logits, targets = make_inputs((1, 3, 3, 4, 5, 7))
    first, second = (gradient(upsample_focal_loss, logits, targets, reduction=reduction) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "case", [{}, pytest.param({"gamma": 0.0, "alpha": 0.6}, marks=slow), {"reduction": "none", "gamma": 1.5}], ids=str
)
def test_gradcheck(backend, case):
    for channels in (1, 2):
        logits, targets = make_inputs((1, channels, 2, 3, 3, 4), torch.float64, scale=1.0)
        fn = partial(upsample_focal_loss, targets=targets, **case)
        assert torch.autograd.gradcheck(fn, logits.requires_grad_(), atol=1e-7, fast_mode=backend == "triton")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2, 2, 2), pytest.param((1, 3, 1, 2, 1, 2), marks=slow)], ids=str)
def test_behaves_like_a_pytorch_operator(backend, shape, reduction):
    logits, targets = make_inputs(shape)
    rule = (0.25, 2.0, 255, reduction)
    torch.library.opcheck(OPERATOR, (logits.requires_grad_(), targets, None, *rule, reduction == "mean"))
    torch.library.opcheck(OPERATOR, (logits.detach(), targets, torch.rand(targets.shape, device=DEVICE), *rule, False))
    if reduction == "mean":
        loss, *sums = OPERATOR(logits.detach(), targets, None, *rule, True)
        arguments = (torch.rand_like(loss), *sums, list(logits.shape), torch.float16, True)
        torch.library.opcheck(torch.ops.dfn_kernels.upsample_loss_bwd.default, arguments)


@torch._inductor.config.patch(force_disable_caches=True)  # the cache does not know when an operator changes
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=slow)])
def test_compiled_equals_eager(backend, compiler):
    if compiler == "inductor" and backend == "triton" and DEVICE == "cpu":
        pytest.skip("the interpreter's kernels cannot be part of a compiled graph's code")
    logits, targets = make_inputs((1, 3, 2, 3, 4, 5))

    def fn(x: Tensor, y: Tensor, reduction: str) -> Tensor:
        return upsample_focal_loss(x, y, reduction=reduction)

    compiled = torch.compile(fn, fullgraph=True, backend=compiler)
    # What it takes to compile C++ for the second is seconds, and the graph is no other.
    for reduction in ("mean",) if compiler == "inductor" else ("mean", "none"):
        for ours, expected in zip(
            gradient(compiled, logits, targets, reduction=reduction),
            gradient(fn, logits, targets, reduction=reduction), strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(ours, expected)


class Criterion(nn.Module):
    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return upsample_focal_loss(2 * logits, targets)


def test_exports_with_any_size(monkeypatch):
    """The operator stays one node of the graph, for sizes that the example did not have."""
    monkeypatch.setenv("DFN_KERNELS", "torch")
    dynamic = torch.export.Dim.AUTO
    shapes = {"logits": {0: dynamic, 2: dynamic, 3: dynamic}, "targets": {0: dynamic, 1: dynamic, 2: dynamic}}
    program = torch.export.export(Criterion(), make_inputs((2, 1, 3, 4, 6, 8)), dynamic_shapes=shapes)
    assert [node.target for node in program.graph.nodes].count(OPERATOR) == 1
    inputs = make_inputs((3, 1, 2, 5, 7, 9))
    torch.testing.assert_close(program.module()(*inputs), Criterion()(*inputs))


def test_autocast_does_not_touch_it(backend):
    logits, targets = make_inputs((1, 1, 2, 3, 4, 5))
    expected = gradient(upsample_focal_loss, logits, targets)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = gradient(upsample_focal_loss, logits, targets)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


BYTES = {"dtype": torch.uint8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 2, 2)}, r"logits \[B, C, H, W\], all but B at least 1, got shape \[3, 2, 2\]"),
        ({"logits": torch.zeros(1, 1, 0, 3)}, r"logits \[B, C, H, W\], all but B at least 1, got shape \[1, 1, 0, 3\]"),
        ({"logits": torch.zeros(1, 1, 2, 3, dtype=torch.int32)}, "logits in float32.*got torch.int32"),
        ({"logits": torch.zeros(1, 257, 2, 3)}, r"at most 256 classes, got logits \[1, 257, 2, 3\]"),
        ({"targets": torch.zeros(1, 5, **BYTES)}, r"of shape \[1, 1, any, any\].*got \[1, 5\]"),
        ({"targets": torch.zeros(2, 4, 5, **BYTES)}, r"of shape \[1, any, any\].*got \[2, 4, 5\]"),
        ({"targets": torch.zeros(1, 2, 4, 5, **BYTES)}, r"of shape \[1, 1, any, any\].*got \[1, 2, 4, 5\]"),
        ({"logits": torch.zeros(1, 3, 2, 2)}, r"of shape \[1, 3, any, any\].*for logits \[1, 3, 2, 2\], got \[1, 4, 5"),
        ({"targets": torch.zeros(1, 0, 5, **BYTES)}, r"rows and columns at least 1.*got \[1, 0, 5\]"),
        ({"targets": torch.zeros(1, 4, 5)}, "in uint8, int32 or int64, got torch.float32"),
        ({"targets": torch.zeros(1, 4, 5, dtype=torch.bool)}, "in uint8, int32 or int64, got torch.bool"),
        ({"targets": torch.zeros(1, 4, 5, device="meta", **BYTES)}, "on cpu.*got meta"),
        ({"alpha": 1.5}, "alpha between 0 and 1, got 1.5"),
        ({"alpha": -0.1}, "alpha between 0 and 1, got -0.1"),
        ({"alpha": float("nan")}, "alpha between 0 and 1, got nan"),
        ({"gamma": -1.0}, "gamma to be finite and not negative, got -1.0"),
        ({"gamma": float("inf")}, "gamma to be finite and not negative, got inf"),
        ({"reduction": "average"}, "reduction to be one of mean, sum, none, got 'average'"),
    ],
)
def test_errors_name_what_is_wrong(change, message):
    call = {"logits": torch.zeros(1, 1, 2, 3), "targets": torch.zeros(1, 4, 5, **BYTES), **change}
    with pytest.raises(ValueError, match=f"upsample_focal_loss expects .*{message}"):
        upsample_focal_loss(**call)


# Scores of 6.4e9 elements, targets of 1e11: the last program's share lies past 2^32 in each.
BATCH, FACTOR = 3, 4
needs_interpreter = pytest.mark.skipif(DEVICE != "cpu", reason="runs in the interpreter; a GPU has the test below")


@needs_interpreter
@pytest.mark.parametrize("channels", [1, 4])
def test_offsets_past_32_bits_forward(monkeypatch, channels):
    small = 46000 // isqrt(channels)
    full = FACTOR * (small - 1) + 1
    tile, (bands, splits) = tuning.loss_tile(channels, small, True), tuning.loss_bands(small, full)
    shape = kernels.gradient_shape(torch.empty(BATCH, channels, small, small, device="meta"), full, True)
    programs, pitch = BATCH * shape[1] * shape[2] * shape[3], shape[-1]
    pixels = ["labels_ptr", "pixel_weight_ptr", "pixel_loss_ptr"]
    found = offsets_of_program(
        monkeypatch, kernels._loss_kernel, programs - 1, programs,
        dict.fromkeys(["logits_ptr", *pixels, "sums_ptr", "gradient_ptr"], torch.float32),
        class_weight_ptr=None, K=channels, h=small, w=small, H=full, W=full, stride_b=small * small * channels,
        stride_row=small * channels, stride_column=channels, pitch=pitch, ignore=255,
        SIGMOID=True, ALPHA=0.25, GAMMA=2.0, ACC=tl.float32,
        REGISTERS=tile.registers, COLUMNS=tile.columns, LANES=tile.lanes, BANDS=bands, SPLITS=splits,
    )  # fmt: skip
    k, image = torch.arange(channels), BATCH - 1
    rows, columns = (torch.arange(small - (small - 1) % n - 1, small) for n in (bands, tile.columns))
    logits = ((image * small + rows[:, None, None]) * small + columns[:, None]) * channels + k
    assert torch.equal(found["logits_ptr"], logits.flatten())
    assert logits.max() == BATCH * small * small * channels - 1 > 2**31
    y, x = (torch.arange(FACTOR * r[0], full) for r in (rows, columns))  # every pixel from the first small one on
    targets = ((image * channels + k[:, None, None]) * full + y[:, None]) * full + x
    for name in pixels:
        assert torch.equal(found[name], targets.flatten())
    assert found["sums_ptr"].tolist() == [programs - 1, 2 * programs - 1]
    last = programs * (bands + 1) * pitch
    assert found["gradient_ptr"].tolist() == list(range(last - (bands + 1) * pitch, last))
    assert last > 2**31


@needs_interpreter
def test_offsets_past_32_bits_backward(monkeypatch):
    small = 46000
    full = FACTOR * (small - 1) + 1
    columns = tuning.loss_tile(1, small, True).columns
    _, segments, splits, tiles, rows, pitch = kernels.gradient_shape(
        torch.empty(BATCH, 1, small, small, device="meta"), full, True
    )
    pointers = {"gradient_ptr": torch.float32, "d_loss_ptr": torch.float32, "scale_ptr": torch.float64}
    programs = BATCH * small * tiles
    found = offsets_of_program(
        monkeypatch, kernels._collect_kernel, programs - 1, programs, pointers | {"d_logits_ptr": torch.float16},
        K=1, h=small, width=small, tiles=tiles, segments=segments, pitch=pitch,
        COLUMNS=columns, BANDS=rows - 1, SPLITS=splits, BLOCK=tuning.power_of_two(columns),
    )  # fmt: skip
    end, width = BATCH * small * small, (small - 1) % columns + 1
    assert found["d_logits_ptr"].tolist() == list(range(end - width, end))
    # The last small row is not the first of its segment: only the tile to the left has a share in it.
    band = (small - 1) % (rows - 1)
    here = (BATCH * segments * splits * tiles - 1) * rows * pitch + band * pitch
    assert band > 0
    own = found["gradient_ptr"] >= here
    assert found["gradient_ptr"][own].tolist() == list(range(here, here + width))
    seam = found["gradient_ptr"][~own] - (here - rows * pitch)  # its one column, and padding where that is faster
    assert columns == seam[0] <= seam[-1] < pitch
    assert here > 2**31


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_more_than_2_to_the_31_pixels():
    """The second image's pixels lie past 2^31: its loss and gradient are those that it has alone."""
    H = W = 33_000
    logits = torch.randn(2, 1, 1032, 1032, device="cuda")
    targets = torch.full((2, H, W), 255, dtype=torch.uint8, device="cuda")
    targets[1] = torch.randint(2, (H, W), dtype=torch.uint8, device="cuda")
    assert targets.numel() > 2**31
    loss, d_logits = gradient(upsample_focal_loss, logits, targets)
    alone, d_alone = gradient(upsample_focal_loss, logits[1:], targets[1:])
    torch.testing.assert_close(loss, alone)
    assert d_logits[0].eq(0).all()
    torch.testing.assert_close(d_logits[1:], d_alone)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("small", [128, 200])
def test_the_networks_own_shapes(small):
    """Border scores at stride 4 of crops of 512 and 800, and four of them at once."""
    for channels in (1, 4):
        inputs = make_inputs((2, channels, small, small, 4 * small, 4 * small), torch.bfloat16)
        assert_no_worse_than(upsample_focal_loss_ref, upsample_focal_loss, inputs)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_cuda_graph():
    logits, targets = make_inputs((2, 1, 32, 32, 128, 128))
    gradient(upsample_focal_loss, logits, targets)  # compiles
    x = logits.clone().requires_grad_()
    graph, d_loss = torch.cuda.CUDAGraph(), random_like(logits.new_empty(()))
    with torch.cuda.graph(graph):
        loss = upsample_focal_loss(x, targets)
        (d_logits,) = torch.autograd.grad(loss, x, d_loss)
    other = torch.randn_like(logits)
    with torch.no_grad():
        x.copy_(other)
    graph.replay()
    for ours, expected in zip((loss, d_logits), gradient(upsample_focal_loss, other, targets), strict=True):
        assert torch.equal(ours, expected)
