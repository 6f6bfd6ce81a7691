"""conv3x3: Winograd's algorithm against the definition in float64, outputs and gradients, and where it is chosen."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dfn_kernels import conv3x3, tuning
from dfn_kernels.convolution import winograd as _winograd
from dfn_kernels.convolution.conv3x3 import conv3x3_ref
from support.allocations import Allocations
from support.layouts import LAYOUTS, with_layouts
from support.parity import assert_no_worse_than, run

# B, I, O, H, W.
SHAPES = [
    (1, 1, 1, 1, 1),  # one element
    (2, 5, 7, 9, 13),  # all odd
    (3, 8, 8, 16, 8),  # whole tiles: nothing is padded behind
    (1, 4, 6, 3, 30),  # lower than a tile
    (2, 6, 3, 17, 5),  # one past a tile
]
OPERATOR = torch.ops.dfn_kernels.conv3x3.default
TILES = sorted(_winograd.POINTS)


@pytest.fixture(params=TILES)
def tile(request, monkeypatch):
    """The side of Winograd's tiles, which are taken whatever the shape."""
    monkeypatch.setattr(tuning, "winograd_tile", lambda *shape, **options: request.param)
    return request.param


def make_inputs(shape, dtype=torch.float32) -> list[Tensor]:
    B, C, O, H, W = shape  # noqa: E741
    generator = torch.Generator().manual_seed(0)
    sizes = [(B, C, H, W), (O, C, 3, 3)]
    return [
        torch.randn(size, generator=generator).to(dtype, memory_format=torch.channels_last) / (3 * C**0.5) ** i
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64(tile, shape):
    inputs = make_inputs(shape, torch.float64)
    ours, expected = run(conv3x3, inputs), run(conv3x3_ref, inputs)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_several_groups_of_tiles(tile, shape, monkeypatch):
    """Memory for a single row of tiles at a time: groups that split an image, and the sums over them."""
    monkeypatch.setattr(_winograd, "WORKSPACE_BYTES", 1 << 10)
    inputs = make_inputs(shape, torch.float64)
    ours, expected = run(conv3x3, inputs), run(conv3x3_ref, inputs)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(1, 512, 192, 16, 16), (2, 160, 512, 13, 9)], ids=str)
def test_bfloat16_is_no_worse_than_the_definition(monkeypatch, shape):
    """With the tiles that the table gives bfloat16."""
    side = tuning.WINOGRAD["bfloat16"].side
    monkeypatch.setattr(tuning, "winograd_tile", lambda *shape, **options: side)
    assert_no_worse_than(conv3x3_ref, conv3x3, make_inputs(shape, torch.bfloat16))


@pytest.mark.parametrize("shape", [(1, 512, 192, 16, 16), (2, 160, 512, 13, 9), (1, 512, 512, 24, 24)], ids=str)
def test_float32_error(monkeypatch, shape):
    """Winograd's own bound, the one exception from the project's tolerance: a known property of the algorithm, not of
    our arithmetic. PyTorch's error depends on which kernel oneDNN takes: 2e-7 to 2e-6 of the largest value."""
    side = tuning.WINOGRAD["float32"].side
    monkeypatch.setattr(tuning, "winograd_tile", lambda *shape, **options: side)
    inputs = make_inputs(shape)
    d_out = torch.randn(shape[0], shape[2], *shape[3:], generator=torch.Generator().manual_seed(1))
    ours = run(conv3x3, inputs, d_out)
    for name, truth in run(conv3x3_ref, [x.double() for x in inputs], d_out).items():
        assert (ours[name] - truth).abs().max() < 5e-6 * truth.abs().max(), name


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("side", TILES)
def test_any_shape_and_layout(side, data):
    size = st.integers(1, 9)
    shape = data.draw(st.tuples(st.integers(1, 3), size, size, size, size))
    layouts, d_out = data.draw(st.tuples(*[st.sampled_from(LAYOUTS)])), data.draw(st.sampled_from(LAYOUTS))
    inputs = make_inputs(shape, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "winograd_tile", lambda *shape, **options: side)
        ours, expected = (run(with_layouts(fn, layouts, d_out), inputs) for fn in (conv3x3, conv3x3_ref))
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-11, atol=1e-11)


def test_bias(tile):
    (x, weight), bias = make_inputs(SHAPES[1], torch.float64), torch.randn(7, dtype=torch.float64)
    ours = _winograd.convolve(x, _winograd.transform_weight(weight, tile), tile, bias)
    torch.testing.assert_close(ours, torch.nn.functional.conv2d(x, weight, bias, padding=1), rtol=1e-11, atol=1e-11)


def test_gradient_of_one_input_alone(tile):
    inputs = make_inputs(SHAPES[1], torch.float64)
    d_out = torch.randn(2, 7, 9, 13, dtype=torch.float64)
    expected = run(conv3x3_ref, inputs, d_out)
    for i in range(2):
        wanted = [x.clone().requires_grad_(i == k) for k, x in enumerate(inputs)]
        conv3x3(*wanted).backward(d_out)
        torch.testing.assert_close(wanted[i].grad, expected[f"gradient {i}"], rtol=1e-11, atol=1e-11)
        assert wanted[1 - i].grad is None


def test_behaves_like_a_pytorch_op(tile):
    torch.library.opcheck(OPERATOR, [x.requires_grad_() for x in make_inputs((2, 3, 4, 7, 5))])


def test_gradcheck(tile):
    inputs = [x.requires_grad_() for x in make_inputs((1, 2, 3, 5, 3), torch.float64)]
    assert torch.autograd.gradcheck(conv3x3, inputs)


def test_compiled_equals_eager(tile):
    inputs = make_inputs((2, 8, 4, 7, 9), torch.float64)
    compiled = torch.compile(conv3x3, fullgraph=True, backend="aot_eager")
    ours, expected = run(compiled, inputs), run(conv3x3, inputs)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


class Block(nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return conv3x3(x.relu(), weight)


def test_exports(tile):
    inputs = tuple(make_inputs((1, 3, 4, 6, 8)))
    program = torch.export.export(Block(), inputs)
    assert [node.target for node in program.graph.nodes].count(OPERATOR) == 1
    torch.testing.assert_close(program.module()(*inputs), Block()(*inputs))


def test_autocast_is_that_of_a_convolution(tile):
    inputs = make_inputs((1, 8, 8, 6, 5))
    with torch.autocast("cpu", torch.bfloat16):
        out = conv3x3(*inputs)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, conv3x3(*(x.bfloat16() for x in inputs)))


def test_two_runs_give_the_same_bits(tile):
    inputs = make_inputs((2, 24, 16, 9, 13))
    torch.use_deterministic_algorithms(True)
    first, second = run(conv3x3, inputs), run(conv3x3, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_threads_do_not_share_workspaces(tile):
    inputs = [make_inputs((2, 16, 16, 24, 20 + i), torch.float64) for i in range(4)]
    expected = [conv3x3_ref(*x) for x in inputs]
    wrong = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.allclose(conv3x3(*inputs[i]), expected[i], rtol=1e-10, atol=1e-10):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_is_bounded_by_the_workspace(monkeypatch):
    """Beyond the result: the padded input, and not the tiles, which lie in memory that is there already."""
    monkeypatch.setattr(tuning, "winograd_tile", lambda *shape, **options: 4)
    monkeypatch.setattr(_winograd, "WORKSPACE_BYTES", 1 << 20)
    x, weight = make_inputs((2, 32, 32, 64, 64))
    conv3x3(x, weight)
    assert Allocations(lambda: conv3x3(x, weight)).peak < 2.6 * x.nbytes


@pytest.mark.parametrize(
    ("shape", "outputs", "dtype", "options", "side"),
    [
        ((1, 512, 64, 64), 512, "float32", {}, 4),
        ((1, 512, 64, 64), 512, "bfloat16", {}, 2),
        ((1, 512, 64, 64), 512, "bfloat16", {"matrix_units": True}, 0),
        ((1, 512, 64, 64), 512, "float32", {"matrix_units": True}, 4),
        ((1, 512, 64, 64), 512, "float16", {}, 0),
        ((1, 256, 64, 64), 512, "float32", {}, 4),
        ((1, 128, 64, 64), 128, "float32", {}, 0),  # the transforms would cost more than they save
        ((1, 512, 24, 24), 512, "float32", {}, 0),  # the weight's own transform would
        ((1, 512, 24, 24), 512, "float32", {"ahead": True}, 4),
        ((2, 512, 8, 8), 512, "float32", {"ahead": True}, 0),
        ((2, 512, 16, 16), 512, "float32", {"ahead": True}, 4),  # the pixels of both images count
        ((1, 512, 16, 16), 512, "float32", {"ahead": True}, 0),
    ],
)
def test_is_chosen_where_it_pays(shape, outputs, dtype, options, side):
    assert tuning.winograd_tile(shape, outputs, dtype, **options) == side


def test_is_chosen_by_the_operator():
    """Many channels and pixels: the operator of ours; few: PyTorch's convolution."""
    for pixels, ours in ((40, True), (8, False)):
        x, weight = make_inputs((1, 512, 512, pixels, pixels))
        graph = torch.export.export(Block(), (x, weight)).graph
        assert (OPERATOR in [node.target for node in graph.nodes]) == ours


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 3, 3), r"got \[2, 3, 4\]"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 3, 3), r"and \[2, 4, 3, 3\]"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 1, 1), r"and \[2, 3, 1, 1\]"),
        (torch.zeros(2, 3, 0, 4), torch.zeros(2, 3, 3, 3), "all but B at least 1"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 3, 3).half(), "weight like x"),
    ],
)
def test_errors_name_what_is_wrong(x, weight, message):
    with pytest.raises(ValueError, match=f"conv3x3 expects .*{message}"):
        conv3x3(x, weight)
