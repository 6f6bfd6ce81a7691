"""Edge cases that no network uses but every operator must handle: sizes of 0 and 1, gaps and offsets in memory,
operands on another device or of another dtype."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dfn_kernels import conv3x3, multiscale_argmax, tuning, upsample_cross_entropy
from dfn_kernels.convolution.fused_conv import fused_conv
from support.every_operator import Problem, Sizes, convolutions, problems, random_gradient, results
from support.parity import DEVICE
from support.tiers import slow

KERNELS = sorted(problems())
CONVOLUTIONS = sorted(convolutions())
SIDES = [(name, side) for name in KERNELS for side in Sizes._fields[1:] if (name, side) != ("resize_normalize", "K")]
SIDES += [(name, side) for name in CONVOLUTIONS for side in ("K", "H", "W", "w")]  # w: outputs
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
on_every_device = pytest.mark.parametrize("other", ["meta", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])


def problem_of(name: str, dtype: torch.dtype = torch.float64, **sizes: int) -> Problem:
    make = problems if name in KERNELS else convolutions
    return make(Sizes(**sizes), dtype, DEVICE)[name]


# For a side of one: what else is there is little, for the interpreter's sake.
SMALLEST = {"B": 1, "K": 2, "H": 3, "W": 3, "h": 2, "w": 2}


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The names of the kernels that are launched."""
    from triton.runtime.jit import KernelInterface

    launched, getitem = [], KernelInterface.__getitem__

    def spy(kernel, grid):
        launched.append(kernel.__name__)
        return getitem(kernel, grid)

    monkeypatch.setattr(KernelInterface, "__getitem__", spy)
    return launched


def assert_equal_results(ours: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)  # shape, dtype and device too


@pytest.mark.parametrize(("name", "side"), [(name, "B") for name in KERNELS + CONVOLUTIONS] + SIDES)
def test_a_side_of_one(backend, name, side):
    problem = problem_of(name, **SMALLEST | {side: 1})
    if (name, side) == ("upsample_cross_entropy", "K"):  # a class alone is always right
        with pytest.raises(ValueError, match=r"^upsample_cross_entropy expects logits of at least 2 classes"):
            problem.operator(*problem.inputs)
        return
    assert_equal_results(results(problem.operator, problem), results(problem.definition, problem))


@pytest.mark.parametrize("name", KERNELS + CONVOLUTIONS)
def test_no_images_give_empty_results_and_zero_gradients(backend, launches, name):
    """As PyTorch's own operations do: a mean over nothing is 0 here, and not nan. No kernel has a grid of nothing."""
    problem = problem_of(name, B=0)
    ours = results(problem.operator, problem)
    assert_equal_results(ours, results(problem.definition, problem), 0)
    assert all((x == 0).all() for x in ours)  # nothing, or zero: the gradient of parameters
    assert launches == []


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["upsample_cross_entropy", "upsample_focal_loss"])
def test_losses_of_no_images(backend, launches, name, reduction):
    problem = problem_of(name, B=0)
    logits, labels = problem.inputs
    logits.requires_grad_()
    loss = problem.operator(logits, labels, reduction=reduction)
    assert loss.shape == (labels.shape if reduction == "none" else ())
    assert loss.sum() == 0
    (d_logits,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    assert d_logits.shape == logits.shape
    assert launches == []


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_any_other_side_of_zero_is_an_error(backend, name, side):
    """Nothing can be resized to something, or something to nothing: PyTorch refuses it too, but for a convolution of no
    input channels."""
    problem = problem_of(name, **{side: 0})
    with pytest.raises(ValueError, match=rf"^{name} expects .*(at least|no larger than).*, got .*\b0\b"):
        problem.operator(*problem.inputs)
    if (name, side) not in {("conv3x3", "K"), ("fused_conv", "K")}:
        with pytest.raises((RuntimeError, ValueError)):
            problem.definition(*problem.inputs)


def test_compiled_for_images_and_given_none(backend):
    """A graph made for some images is not misused for none."""
    torch._dynamo.reset()
    compiled = torch.compile(upsample_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    for B in (2, 0):
        problem = problem_of("upsample_cross_entropy", **SMALLEST | {"B": B})
        assert_equal_results(results(compiled, problem), results(problem.definition, problem))


def gaps(x: Tensor) -> Tensor:
    """x with an element between any two, in every dimension."""
    for dim in range(x.ndim):
        x = torch.stack([x, torch.full_like(x, 77)], dim + 1).flatten(dim, dim + 1)
    return x[(slice(None, None, 2),) * x.ndim]


def wider(x: Tensor) -> Tensor:
    """x as the inner channels of more, one element behind an aligned address."""
    if x.ndim < 2:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    more = torch.cat([torch.full_like(x[:, :1], 77), x, torch.full_like(x[:, :2], 77)], 1)
    return (more.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else more)[:, 1:-2]


def turned(x: Tensor) -> Tensor:
    """x in the reverse order of dimensions."""
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def expanded(x: Tensor) -> Tensor:
    """The first of x for all: no distance between them. Other values than x."""
    return x[:1].expand_as(x) if x.ndim else x.expand(1)[0]


def storage(x: Tensor) -> Tensor:
    """A copy of the bytes of all the memory that x is a part of."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage()).clone()


VIEWS = pytest.mark.parametrize(
    "view",
    [pytest.param(gaps, marks=slow), wider, turned, pytest.param(expanded, marks=slow)],
    ids=["gaps", "wider", "turned", "expanded"],
)
HALVES = (torch.float16, torch.bfloat16)
# The interpreter knows no alignment: one dtype tells what a program reads. A GPU compiles for it.
PATHS: list[Any] = [("torch", dtype) for dtype in (torch.float32, *HALVES)]
if DEVICE == "cuda":
    PATHS += [pytest.param("triton", dtype, marks=pytest.mark.gpu) for dtype in (torch.float32, *HALVES)]
else:
    PATHS += [("triton", torch.float16)]


@VIEWS
@pytest.mark.parametrize(("path", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("name", KERNELS + CONVOLUTIONS)
def test_memory_may_lie_as_it_likes(monkeypatch, name, path, dtype, view):
    """Inputs and the output's gradient, from views and from copies of them; all the memory behind stays as it was."""
    monkeypatch.setenv("DFN_KERNELS", path)
    # 8 channels in half precision are one access of 16 bytes where they are aligned.
    problem = problem_of(name, dtype, K=8, H=3, W=4, h=2, w=3)
    views = [view(x) for x in problem.inputs]
    before = [storage(x) for x in views]
    copies = problem._replace(inputs=tuple(x.clone(memory_format=torch.contiguous_format) for x in views))
    d_out = None
    if problem.differentiable:
        d_out = view(random_gradient(problem.definition(*copies.inputs)))
    expected = results(problem.operator, copies, None if d_out is None else d_out.clone())
    ours = results(problem.operator, problem._replace(inputs=tuple(views)), d_out)
    # Another alignment may be another order of a sum on a GPU, and another algorithm of a library.
    exact = DEVICE == "cpu" and name in KERNELS
    for one, other in zip(ours, expected, strict=True):
        eps = torch.finfo(one.dtype).eps if one.is_floating_point() else 0
        torch.testing.assert_close(one, other, rtol=0, atol=0 if exact else 8 * eps * other.double().abs().max().item())
    assert all(torch.equal(storage(x), kept) for x, kept in zip(views, before, strict=True))


@VIEWS
@pytest.mark.parametrize("side", [2, 4])
def test_winograds_tiles_are_cut_from_any_memory(monkeypatch, view, side):
    monkeypatch.setattr(tuning, "winograd_tile", lambda *shape, **options: side)
    for problem in convolutions(Sizes(H=7, W=9)).values():
        views = problem._replace(inputs=tuple(view(x) for x in problem.inputs))
        d_out = view(random_gradient(problem.definition(*problem.inputs)))
        assert_equal_results(
            results(views.operator, views, d_out), results(views.definition, views, d_out), tolerance=1e-10
        )


@pytest.mark.parametrize("name", [name for name in KERNELS + CONVOLUTIONS if problem_of(name).differentiable])
def test_gradients_of_some_inputs_alone(backend, name):
    problem = problem_of(name)
    every = results(problem.operator, problem)[1:]
    for i, expected in enumerate(every):
        if backend == "triton" and DEVICE == "cpu" and 0 < i < len(every) - 1:
            continue  # the interpreter takes its time: the first and the last
        inputs = [x.detach().requires_grad_(i == j) for j, x in enumerate(problem.inputs)]
        out = problem.operator(*inputs)
        (gradient,) = torch.autograd.grad(out, inputs[i], random_gradient(out))
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def arguments_of(name: str) -> list[tuple[str, int]]:
    return [(name, i) for i in range(len(problem_of(name).inputs))]


# What an error calls each input; the first is what the others are held against.
ARGUMENTS = {
    "channel_attention": ["high", "high", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"],
    "upsample_add": ["high", "high"],
    "upsample_cross_entropy": ["labels", "labels"],
    "upsample_focal_loss": ["labels", "labels"],
    "multiscale_argmax": [r"logits\[1\]", r"logits\[1\]"],
    "conv3x3": ["weight", "weight"],
    "fused_conv": ["weight", "weight", "bias", "residual"],
}


@on_every_device
@pytest.mark.parametrize(("name", "index"), [case for name in ARGUMENTS for case in arguments_of(name)])
def test_an_operand_on_another_device_is_named(backend, name, index, other):
    inputs = [x.cpu() for x in problem_of(name).inputs]
    inputs[index] = inputs[index].to(other)
    message = f"^{name} expects {ARGUMENTS[name][index]} .*"
    with pytest.raises(ValueError, match=message) as raised:
        problem_of(name).operator(*inputs)
    assert {"cpu", other} <= set(re.findall(r"cpu|meta|cuda", str(raised.value)))


@on_every_device
def test_class_weights_on_another_device_are_named(backend, other):
    logits, labels = (x.cpu() for x in problem_of("upsample_cross_entropy").inputs)
    with pytest.raises(ValueError, match=rf"^upsample_cross_entropy expects class_weight .*on cpu.*got .*on {other}"):
        upsample_cross_entropy(logits, labels, class_weight=torch.ones(3, device=other))


@pytest.mark.parametrize(
    ("name", "index"),
    [case for name in ("channel_attention", "upsample_add", *CONVOLUTIONS) for case in arguments_of(name)],
)
def test_an_operand_of_another_dtype_is_named(backend, name, index):
    """Nothing is promoted in silence; scores of several scales may differ, and parameters from features as a whole."""
    inputs = list(problem_of(name, torch.float32).inputs)
    inputs[index] = inputs[index].bfloat16()
    argument = {2: "fc1_bias"}.get(index, ARGUMENTS[name][index]) if name == "channel_attention" else None
    with pytest.raises(ValueError, match=f"^{name} expects {argument or ARGUMENTS[name][index]} .*got .*torch.*"):
        problem_of(name).operator(*inputs)


@pytest.mark.parametrize(
    ("operator", "change"),
    [
        (fused_conv, {"residual": torch.zeros(2, 3, 4, 4)}),  # oneDNN would read past its end
        (fused_conv, {"residual": torch.zeros(1, 3, 1, 1)}),
        (fused_conv, {"bias": torch.zeros(2)}),
        (fused_conv, {"weight": torch.zeros(3, 4, 3, 3)}),
        (fused_conv, {"weight": torch.zeros(3, 3, 9, 9)}),  # larger than the padded image
        (conv3x3, {"weight": torch.zeros(3, 4, 3, 3)}),
    ],
)
def test_operands_of_a_convolution_that_do_not_fit_are_named(
    operator: Callable[..., Any], change: dict[str, Tensor]
) -> None:
    call = {"x": torch.zeros(2, 3, 4, 5), "weight": torch.zeros(3, 3, 3, 3)} | change
    options = {"padding": 1} if operator is fused_conv else {}
    with pytest.raises(ValueError, match=f"^{operator.__name__} expects .*{next(iter(change))}.*got"):
        operator(**call, **options)


def test_one_map_alone(backend):
    """The smallest number of scales; none at all is an error."""
    x = problem_of("multiscale_argmax").inputs[0]
    assert torch.equal(multiscale_argmax([x], x.shape[2:]).long(), x.argmax(1))
    with pytest.raises(ValueError, match=r"^multiscale_argmax expects a list of one or more score maps"):
        multiscale_argmax([], (4, 5))
