import mmap
from functools import partial
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from dfn_kernels.losses.cross_entropy import upsample_cross_entropy, upsample_cross_entropy_ref
from dfn_kernels.losses.upsample_loss_triton import gradient_shape
from support.allocations import Allocations
from support.loss_problems import gradient
from support.parity import DEVICE, DTYPES, assert_no_worse_than, random_like
from support.tiers import each_with_one_dtype, examples, slow

# Rows and the columns between two small columns cost time in the interpreter; width and classes do not.
SHAPES = [
    (1, 2, 1, 1, 1, 1),  # one element, the fewest classes
    (2, 3, 1, 1, 3, 5),  # one small pixel for all
    (2, 5, 3, 4, 7, 9),  # all odd, a factor that is no integer, two images
    (1, 21, 2, 9, 5, 33),  # the network's classes, and exactly its factor, 4
    (1, 33, 3, 18, 3, 18),  # same size; one class past a power of two, two columns past a tile
    (1, 6, 7, 9, 3, 4),  # smaller: small rows and columns with no pixel between them
    (1, 4, 2, 3, 1, 1),  # to a single pixel
    (1, 3, 9, 3, 10, 5),  # more small rows than one program walks down
    (1, 3, 2, 2, 34, 3),  # a large factor: the rows between two small ones are shared by programs
]


def make_inputs(shape, dtype=torch.float32, ignored=0.2, scale=3.0):
    B, K, h, w, H, W = shape
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(B, K, h, w, generator=generator)
    labels = torch.randint(K, (B, H, W), generator=generator, dtype=torch.uint8)
    labels[torch.rand(B, H, W, generator=generator) < ignored] = 255
    labels.view(-1)[0] = 0  # at least one is valid
    return logits.to(DEVICE, dtype), labels.to(DEVICE)


@pytest.mark.parametrize(("shape", "dtype"), each_with_one_dtype(SHAPES, DTYPES))
def test_matches_the_definition(backend, shape, dtype):
    assert_no_worse_than(upsample_cross_entropy_ref, upsample_cross_entropy, make_inputs(shape, dtype))


@pytest.mark.parametrize("reduction", ["mean", pytest.param("sum", marks=slow), "none"])
@pytest.mark.parametrize("gamma", [0.0, 2.0, 0.7])
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_the_definition_at_every_setting(backend, reduction, gamma, weighted):
    class_weight = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], device=DEVICE) if weighted else None
    settings = {"reduction": reduction, "gamma": gamma, "class_weight": class_weight}
    fns = (partial(fn, **settings) for fn in (upsample_cross_entropy_ref, upsample_cross_entropy))
    assert_no_worse_than(*fns, make_inputs((1, 5, 2, 3, 3, 5)))


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("ignore_index", [255, 0, -100])
def test_label_dtypes_and_ignored_values(backend, label_dtype, ignore_index):
    logits, labels = make_inputs((1, 4, 2, 3, 4, 5))
    labels = labels.to(label_dtype)
    if label_dtype != torch.uint8:
        labels[labels == 255] = ignore_index
    expected = gradient(upsample_cross_entropy_ref, logits, labels, ignore_index=ignore_index)
    for ours, theirs in zip(
        gradient(upsample_cross_entropy, logits, labels, ignore_index=ignore_index), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["", "weights of all pixels below 1"])
def test_agrees_with_pytorch(backend, scale):
    """The definition itself is held against what PyTorch calls cross entropy."""
    logits, labels = make_inputs((2, 5, 2, 4, 4, 9), torch.float64)
    weight = (torch.rand(5, dtype=torch.float64, device=DEVICE) + 0.1) * scale
    full = F.interpolate(logits, size=(4, 9), mode="bilinear", align_corners=True)
    expected = F.cross_entropy(full, labels.long(), weight, ignore_index=255)
    assert upsample_cross_entropy(logits, labels, class_weight=weight).item() == pytest.approx(expected.item(), 1e-12)


def test_256_classes(backend):
    logits, labels = make_inputs((1, 256, 2, 3, 3, 4))
    assert_no_worse_than(upsample_cross_entropy_ref, upsample_cross_entropy, (logits, labels))


@st.composite
def problems(draw):
    """Logits and labels in any layout, and a gradient for each pixel."""
    B, K = draw(st.integers(1, 2)), draw(st.integers(2, 9))
    (h, w), (H, W) = (draw(st.tuples(st.integers(1, most), st.integers(1, most))) for most in (3, 5))
    logits, labels = make_inputs((B, K, h, w, H, W), draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["contiguous", "channels_last", "sliced", "expanded"]))
    if layout == "channels_last":
        logits = logits.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":  # the first K of more channels, as of padded ones
        padded = torch.cat([logits, logits], 1).contiguous(memory_format=torch.channels_last)
        logits, labels = padded[:, :K], torch.stack([labels, labels], 2)[:, :, 0]
    elif layout == "expanded":
        logits, labels = logits[:1].expand(B, K, h, w), labels[:, :1].expand(B, H, W)
    d_loss = torch.randn(B, H, 1, device=DEVICE).expand(B, H, W) if draw(st.booleans()) else None
    return logits, labels.to(draw(st.sampled_from([torch.uint8, torch.int32, torch.int64]))), d_loss


@examples(4, 15, problem=problems())
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_any_shape_dtype_and_layout(name, problem):
    logits, labels, d_loss = problem
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFN_KERNELS", name)
        for fn, x in ((upsample_cross_entropy, logits), (upsample_cross_entropy_ref, logits.double())):
            x = x.detach().requires_grad_()
            loss = fn(x, labels, reduction="mean" if d_loss is None else "none")
            results.append((loss, *torch.autograd.grad(loss, x, None if d_loss is None else d_loss.to(loss.dtype))))
    (loss, d_logits), (true_loss, true_d_logits) = results
    assert d_logits.dtype == logits.dtype
    assert d_logits.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-5)
    eps = torch.finfo(logits.dtype).eps
    torch.testing.assert_close(d_logits.double(), true_d_logits, rtol=8 * eps, atol=8 * eps)


def test_a_common_offset_changes_nothing(backend):
    logits, labels = make_inputs((1, 5, 3, 4, 7, 9))
    logits = (logits * 64).round() / 64  # so that adding the offset is exact
    for ours, expected in zip(
        gradient(upsample_cross_entropy, logits + 1e4, labels),
        gradient(upsample_cross_entropy, logits, labels), strict=True,
    ):  # fmt: skip
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 0.5])
def test_certain_pixels_give_finite_gradients(backend, gamma):
    """Probabilities of exactly 1 and 0, right and wrong, and the largest logits that a half can hold."""
    logits = torch.tensor([[65504.0, -65504.0], [-65504.0, 65504.0]], device=DEVICE).half().view(1, 2, 1, 2)
    labels = torch.tensor([[[0, 0, 1, 0, 0]]], device=DEVICE)
    loss, d_logits = gradient(upsample_cross_entropy, logits, labels, gamma=gamma, reduction="none")
    assert loss.isfinite().all()
    assert loss[0, 0, 0] == 0
    assert loss[0, 0, 4] == pytest.approx(2 * 65504)
    assert d_logits.isfinite().all()


def test_no_valid_pixel_gives_zero(backend):
    logits, labels = make_inputs((2, 3, 2, 2, 3, 4))
    for class_weight in (None, torch.ones(3, device=DEVICE)):
        loss, d_logits = gradient(
            upsample_cross_entropy, logits, torch.full_like(labels, 255), class_weight=class_weight
        )
        assert loss == 0
        assert d_logits.eq(0).all()


def test_a_large_factor_of_the_loss_reaches_the_gradient(backend):
    """As gradient scaling does; and two losses add up in ``grad``."""
    logits, labels = make_inputs((1, 3, 2, 3, 4, 5))
    _, plain = gradient(upsample_cross_entropy, logits, labels)
    _, expected = gradient(upsample_cross_entropy_ref, logits, labels)
    torch.testing.assert_close(plain, expected)
    x = logits.requires_grad_()
    for _ in range(2):
        (upsample_cross_entropy(x, labels) * 1024).backward(random_like(plain.new_empty(())))
    torch.testing.assert_close(x.grad, expected * 2048)


def test_half_gradients_of_a_mean_do_not_underflow(backend):
    """Pixels that are nearly certain: what a scaled loss restores must not be lost before it is scaled."""
    logits, labels = make_inputs((1, 3, 8, 128, 8, 128), torch.float16, scale=0.1)
    logits[:, 0] += 8.5
    labels, scale = torch.zeros_like(labels), 2.0**14
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    (upsample_cross_entropy(x, labels) * scale).backward()
    (upsample_cross_entropy_ref(y, labels) * scale).backward()
    assert (y.grad / scale).abs().max() < 16 * 2**-24  # the steps of a half down there
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=2e-3, atol=0)


def test_without_gradients(backend):
    logits, labels = make_inputs((1, 5, 2, 3, 4, 5))
    expected = upsample_cross_entropy_ref(logits, labels)
    torch.testing.assert_close(upsample_cross_entropy(logits, labels), expected)
    with torch.no_grad():
        torch.testing.assert_close(upsample_cross_entropy(logits.requires_grad_(), labels), expected)


def test_labels_out_of_range(backend, monkeypatch):
    logits, labels = make_inputs((1, 5, 2, 3, 4, 5))
    labels = labels.int()
    wrong, ignored = labels.clone(), labels.clone()
    wrong[0, 1, :3] = torch.tensor([5, -1, 2**31 - 1], dtype=torch.int32)
    ignored[0, 1, :3] = 255
    for ours, expected in zip(
        gradient(upsample_cross_entropy, logits, wrong), gradient(upsample_cross_entropy, logits, ignored), strict=True
    ):
        assert torch.equal(ours, expected)
    monkeypatch.setenv("DFN_KERNELS_DEBUG", "1")
    upsample_cross_entropy(logits, ignored)
    with pytest.raises(ValueError, match=r"upsample_cross_entropy expects labels in 0 \.\.\. 4 or 255.*got 5"):
        upsample_cross_entropy(logits, wrong)


@pytest.mark.parametrize("factor", [pytest.param(2, marks=slow), 4, pytest.param(32, marks=slow)])
def test_memory_is_that_of_the_small_logits(backend, factor):
    """Nothing of B * K * H * W elements exists, forward or backward; on the CPU path there is a chunk besides."""
    h, w = {2: (9, 65), 4: (5, 33), 32: (2, 5)}[factor]
    logits, labels = make_inputs((1, 24, h, w, factor * (h - 1) + 1, factor * (w - 1) + 1))
    small, full = logits.nbytes, 24 * labels.numel() * 4
    made = Allocations(lambda: gradient(upsample_cross_entropy, logits, labels))
    if backend == "torch":
        assert made.peak < 8 * small + 2 * full
        return
    sums = 4 * prod(gradient_shape(logits, labels.shape[1], False))
    assert made.largest == max(sums, small)
    assert made.largest < 0.7 * full
    assert made.peak < sums + 3 * small + 4096  # the logits' gradient, and each program's sums of loss and weight


@pytest.mark.parametrize(("factor", "most"), [(2, 1.4), (4, 1.4), (8, 1.6), (16, 4.2), (32, 9)])
def test_sums_of_the_gradient_at_the_networks_shapes(factor, most):
    """What the docstring says of 21 classes at 512 x 512, in sizes of the float32 logits."""
    logits = torch.empty(4, 21, 512 // factor, 512 // factor, device="meta")
    assert prod(gradient_shape(logits, 512, False)) <= most * logits.numel()


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU path")
def test_memory_is_below_a_third_of_pytorchs(monkeypatch):
    """At 21 classes, 512 x 512, batch 4: far below, for what is held of full size is a chunk of rows."""
    monkeypatch.setenv("DFN_KERNELS", "torch")
    torch.use_deterministic_algorithms(False)  # filling 88 MB with NaN again and again takes its time
    inputs = make_inputs((4, 21, 128, 128, 512, 512))
    ours, theirs = (
        Allocations(lambda fn=fn: gradient(fn, *inputs)) for fn in (upsample_cross_entropy, upsample_cross_entropy_ref)
    )
    assert ours.peak < theirs.peak / 10
    assert ours.largest <= inputs[0].nbytes


def test_same_bits_every_time(backend):
    torch.use_deterministic_algorithms(True)  # an error from here on
    logits, labels = make_inputs((2, 5, 3, 4, 7, 9))
    first, second = (gradient(upsample_cross_entropy, logits, labels, gamma=2.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradcheck(backend):
    logits, labels = make_inputs((1, 3, 2, 2, 3, 3), torch.float64)
    weight = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64, device=DEVICE)
    for case in ({}, {"gamma": 1.5, "class_weight": weight}, {"reduction": "none", "gamma": 2.0}):
        fn = partial(upsample_cross_entropy, labels=labels, **case)
        assert torch.autograd.gradcheck(fn, logits.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_behaves_like_a_pytorch_operator(backend, reduction):
    logits, labels = make_inputs((1, 3, 1, 2, 2, 3))
    op = torch.ops.dfn_kernels.upsample_cross_entropy.default
    need_grad = reduction == "mean"
    torch.library.opcheck(op, (logits.requires_grad_(), labels, None, None, 255, 2.0, reduction, need_grad))
    torch.library.opcheck(op, (logits.detach(), labels, torch.ones(3, device=DEVICE), None, 255, 0.0, reduction, False))


@torch._inductor.config.patch(force_disable_caches=True)  # the cache does not know when an operator changes
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=slow)])
def test_compiled_equals_eager(backend, compiler):
    if compiler == "inductor" and backend == "triton" and DEVICE == "cpu":
        pytest.skip("the interpreter's kernels cannot be part of a compiled graph's code")
    logits, labels = make_inputs((1, 5, 2, 3, 4, 5))
    for reduction in ("mean", "none"):
        fn = partial(upsample_cross_entropy, reduction=reduction, gamma=1.0)
        compiled = torch.compile(lambda x, y, fn=fn: fn(x, y), fullgraph=True, backend=compiler)
        for ours, expected in zip(gradient(compiled, logits, labels), gradient(fn, logits, labels), strict=True):
            torch.testing.assert_close(ours, expected)


def test_exports(backend):
    class Loss(torch.nn.Module):
        def forward(self, logits, labels):
            return upsample_cross_entropy(2 * logits, labels)

    logits, labels = make_inputs((1, 5, 2, 3, 4, 5))
    exported = torch.export.export(Loss(), (logits, labels)).module()
    torch.testing.assert_close(exported(logits, labels), Loss()(logits, labels))


def test_autocast_does_not_touch_it(backend):
    logits, labels = make_inputs((1, 5, 2, 3, 4, 5))
    expected = gradient(upsample_cross_entropy, logits, labels)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = gradient(upsample_cross_entropy, logits, labels)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 2, 2)}, r"logits \[B, C, H, W\], all but B at least 1, got shape \[3, 2, 2\]"),
        ({"logits": torch.zeros(1, 5, 2, 3, dtype=torch.int32)}, "logits in float32.*got torch.int32"),
        ({"logits": torch.zeros(1, 1, 2, 3)}, r"at least 2 classes, got \[1, 1, 2, 3\]"),
        ({"logits": torch.zeros(1, 257, 2, 3)}, r"at most 256 classes, got logits \[1, 257, 2, 3\]"),
        ({"labels": torch.zeros(1, 5, dtype=torch.uint8)}, r"labels of shape \[1, any, any\].*got \[1, 5\]"),
        ({"labels": torch.zeros(2, 4, 5, dtype=torch.uint8)}, r"labels of shape \[1, any, any\].*got \[2, 4, 5\]"),
        ({"labels": torch.zeros(1, 0, 5, dtype=torch.uint8)}, "rows and columns at least 1"),
        ({"labels": torch.zeros(1, 4, 5)}, "labels in uint8, int32 or int64, got torch.float32"),
        ({"labels": torch.zeros(1, 4, 5, dtype=torch.uint8, device="meta")}, "labels on cpu.*got meta"),
        ({"class_weight": torch.ones(4)}, r"class_weight \[5\] on cpu.*got \[4\]"),
        ({"class_weight": torch.ones(5, requires_grad=True)}, "without a gradient.*requires_grad=True"),
        ({"gamma": -1.0}, "gamma to be finite and not negative, got -1.0"),
        ({"reduction": "average"}, "reduction to be one of mean, sum, none, got 'average'"),
    ],
)
def test_errors_name_what_is_wrong(change, message):
    call = {"logits": torch.zeros(1, 5, 2, 3), "labels": torch.zeros(1, 4, 5, dtype=torch.uint8), **change}
    with pytest.raises(ValueError, match=f"upsample_cross_entropy expects .*{message}"):
        upsample_cross_entropy(**call)


@pytest.mark.skipif(DEVICE != "cpu", reason="runs in the interpreter; a GPU has the test below")
def test_offsets_past_32_bits(triton_backend):
    """Images that lie 2^31 elements apart, in memory of which only the touched pages exist."""
    logits, labels = make_inputs((2, 5, 2, 3, 3, 5), torch.float16)
    apart = 2**31 + 16
    with mmap.mmap(-1, 2 * (apart + 64), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        strided = torch.frombuffer(memory, dtype=torch.float16).as_strided(logits.shape, (apart, 1, 15, 5))
        strided.copy_(logits)
        ours = gradient(upsample_cross_entropy, strided, labels)
        del strided
    for a, b in zip(ours, gradient(upsample_cross_entropy, logits, labels), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_more_than_2_to_the_31_pixels():
    """The second image's pixels lie past 2^31: its loss and gradient are those that it has alone."""
    H = W = 33_000
    logits = torch.randn(2, 2, 1032, 1032, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.full((2, H, W), 255, dtype=torch.uint8, device="cuda")
    labels[1] = torch.randint(2, (H, W), dtype=torch.uint8, device="cuda")
    loss, d_logits = gradient(upsample_cross_entropy, logits, labels)
    alone, d_alone = gradient(upsample_cross_entropy, logits[1:], labels[1:])
    torch.testing.assert_close(loss, alone)
    assert d_logits[0].eq(0).all()
    torch.testing.assert_close(d_logits[1:], d_alone)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("small", [16, 32, 64, 128])
def test_the_networks_own_shapes(small):
    assert_no_worse_than(
        upsample_cross_entropy_ref, upsample_cross_entropy, make_inputs((2, 21, small, small, 512, 512), torch.bfloat16)
    )


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_cuda_graph():
    logits, labels = make_inputs((2, 21, 16, 16, 64, 64))
    expected = gradient(upsample_cross_entropy, logits, labels)
    graph, d_loss = torch.cuda.CUDAGraph(), random_like(expected[0])
    x = logits.clone().requires_grad_()
    with torch.cuda.graph(graph):
        loss = upsample_cross_entropy(x, labels)
        (d_logits,) = torch.autograd.grad(loss, x, d_loss)
    graph.replay()
    assert torch.equal(loss, expected[0])
    assert torch.equal(d_logits, expected[1])
