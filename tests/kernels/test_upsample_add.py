"""upsample_add: low plus the resized high, against the definition in float64, outputs and gradients."""

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from dfn_kernels import tuning
from dfn_kernels.attention import upsample_add_triton as kernels
from dfn_kernels.attention.upsample_add import upsample_add, upsample_add_ref
from dfn_kernels.common.triton_or_stub import tl
from support.addresses import offsets_of_program
from support.allocations import Allocations
from support.layouts import LAYOUTS, with_layouts
from support.parity import DEVICE, DTYPES, assert_no_worse_than, run
from support.tiers import each_with_one_dtype, examples, slow

# B, C, the full size, the small size.
SHAPES = [
    (1, 1, 1, 1, 1, 1),  # one element
    (2, 5, 7, 9, 3, 4),  # all odd, a factor that is no integer, channels that do not fill an access
    (2, 24, 4, 32, 2, 16),  # factor 2, exactly one tile of columns
    (1, 16, 16, 16, 1, 1),  # one pixel to all
    (1, 34, 3, 17, 2, 9),  # one small column past a tile, more than one block of channels
    (1, 8, 17, 17, 2, 2),  # factor 16
    (1, 6, 9, 5, 3, 2),  # factor 4
    (1, 9, 3, 4, 5, 7),  # high is the larger one
    (1, 8, 1, 7, 4, 3),  # one row
    (1, 16, 5, 7, 5, 7),  # no resize
]
OPERATOR = torch.ops.dfn_kernels.upsample_add.default


def make_inputs(shape, dtype=torch.float32) -> list[Tensor]:
    B, C, H, W, h, w = shape
    generator = torch.Generator(DEVICE).manual_seed(0)
    sizes = [(B, C, H, W), (B, C, h, w)]
    return [
        torch.randn(size, generator=generator, device=DEVICE).to(dtype, memory_format=torch.channels_last)
        for size in sizes
    ]


@pytest.mark.parametrize(("shape", "dtype"), each_with_one_dtype(SHAPES, DTYPES))
def test_matches_the_definition(backend, shape, dtype):
    assert_no_worse_than(upsample_add_ref, upsample_add, make_inputs(shape, dtype))


@examples(4, 15, data=st.data())
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_any_shape_dtype_and_layout(name, data):
    size = st.integers(1, 6)
    shape = data.draw(st.tuples(st.integers(1, 2), size, size, size, size, size))
    layouts = data.draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 2))
    d_out = data.draw(st.sampled_from(LAYOUTS))
    inputs = make_inputs(shape, data.draw(st.sampled_from(DTYPES)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFN_KERNELS", name)
        ref, ours = (with_layouts(fn, layouts, d_out) for fn in (upsample_add_ref, upsample_add))
        assert_no_worse_than(ref, ours, inputs)


@pytest.mark.parametrize("shape", SHAPES[1:6], ids=str)
def test_float64(backend, shape):
    inputs = make_inputs(shape, torch.float64)
    ours, expected = run(upsample_add, inputs), run(upsample_add_ref, inputs)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-12, atol=1e-12)


def test_one_program_may_walk_down_many_rows(triton_backend, monkeypatch):
    """More small rows than one run, and a last run that is shorter."""
    monkeypatch.setattr(tuning, "PROGRAMS", 1)
    assert tuning.upsample_add_bwd_run(2, 11) == 8
    assert_no_worse_than(upsample_add_ref, upsample_add, make_inputs((2, 8, 25, 5, 11, 3)))


def test_output_and_gradients_are_channels_last(backend):
    inputs = make_inputs((2, 8, 6, 8, 3, 4), torch.float16)
    for name, x in run(upsample_add, inputs, torch.ones_like(inputs[0])).items():
        assert x.is_contiguous(memory_format=torch.channels_last), name


def test_gradient_of_one_input_alone(backend):
    low, high = make_inputs((2, 5, 7, 9, 3, 4))
    expected = run(upsample_add, [low, high])
    d_out = torch.randn(low.shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
    for i in range(2):
        inputs = [x.clone().requires_grad_(i == k) for k, x in enumerate((low, high))]
        upsample_add(*inputs).backward(d_out)
        torch.testing.assert_close(inputs[i].grad, expected[f"gradient {i}"], rtol=0, atol=0)
        assert inputs[1 - i].grad is None


def test_behaves_like_a_pytorch_op(backend):
    torch.library.opcheck(OPERATOR, [x.requires_grad_() for x in make_inputs((2, 3, 7, 5, 3, 2))])


def test_gradcheck(backend):
    inputs = [x.requires_grad_() for x in make_inputs((1, 2, 3, 5, 2, 3), torch.float64)]
    assert torch.autograd.gradcheck(upsample_add, inputs, fast_mode=backend == "triton")
    assert torch.autograd.gradcheck(OPERATOR, inputs, fast_mode=backend == "triton")


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=slow)])
def test_compiled_equals_eager(monkeypatch, compiler):
    monkeypatch.setenv("DFN_KERNELS", "torch")
    inputs = make_inputs((2, 8, 7, 9, 3, 4))
    compiled = torch.compile(upsample_add, fullgraph=True, backend=compiler)
    ours, expected = run(compiled, inputs), run(upsample_add, inputs)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-6, atol=1e-6)


class Block(nn.Module):
    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return upsample_add(low.relu(), high)


def test_exports_with_any_size(monkeypatch):
    """The operator stays one node of the graph, for sizes that the example did not have."""
    monkeypatch.setenv("DFN_KERNELS", "torch")
    dynamic = torch.export.Dim.AUTO
    shapes = {name: {0: dynamic, 2: dynamic, 3: dynamic} for name in ("low", "high")}
    program = torch.export.export(Block(), tuple(make_inputs((2, 3, 6, 8, 3, 4))), dynamic_shapes=shapes)
    assert [node.target for node in program.graph.nodes].count(OPERATOR) == 1
    inputs = make_inputs((2, 3, 9, 7, 4, 5))
    torch.testing.assert_close(program.module()(*inputs), Block()(*inputs))


def test_autocast_leaves_the_dtype(backend):
    inputs = make_inputs((1, 8, 5, 6, 3, 3))
    expected = upsample_add(*inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(upsample_add(*inputs), expected)


def test_two_runs_give_the_same_bits(backend):
    inputs = make_inputs((2, 24, 9, 13, 4, 5))
    torch.use_deterministic_algorithms(DEVICE == "cpu" or backend == "triton")  # on CUDA PyTorch's own has no such form
    first, second = run(upsample_add, inputs), run(upsample_add, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_cpu_path_makes_nothing_but_its_result(monkeypatch):
    monkeypatch.setenv("DFN_KERNELS", "torch")
    low, high = (x.cpu() for x in make_inputs((2, 64, 32, 32, 16, 16)))
    assert Allocations(lambda: upsample_add(low, high)).peak < 1.1 * low.nbytes


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (
            torch.zeros(2, 3, 4),
            torch.zeros(2, 3, 2, 2),
            r"low \[B, C, H, W\], all but B at least 1, got shape \[2, 3, 4\]",
        ),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 0, 2), r"high \[B, C, H, W\], all but B at least 1"),
        (
            torch.zeros(2, 3, 4, 4),
            torch.zeros(2, 4, 2, 2),
            r"B and C of low, got high \[2, 4, 2, 2\] and low \[2, 3, 4",
        ),
        (torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 2, 2), "B and C of low"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2).half(), "high like low.*got torch.float16"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2, device="meta"), "high like low.*on meta"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 3, 2, 2), "low in float32.*got torch.uint8"),
    ],
)
def test_errors_name_what_is_wrong(low, high, message):
    with pytest.raises(ValueError, match=f"upsample_add expects .*{message}"):
        upsample_add(low, high)


def test_coordinates_past_32_bits_are_an_error(triton_backend):
    """Before anything is allocated: the expanded inputs have one element each."""
    low, high = (torch.zeros(1, 1, 1, 1, device=DEVICE).expand(1, 1, 2, width) for width in (2**27, 8))
    with pytest.raises(ValueError, match=r"upsample_add expects H \* h and W \* w below 2\^30.*got 2 x 134217728"):
        upsample_add(low, high)


# A tensor of 1.3e10 elements: the last tile of the last image lies past 2^33.
BATCH, GROUPS, VECTOR, SIDE, SMALL = 3, 8, 8, 8192, 4096
LARGE = {"height": SIDE, "width": SIDE, "small_height": SMALL, "small_width": SMALL, "groups": GROUPS, "VECTOR": VECTOR}
LAST, LAST_SMALL = BATCH * SIDE**2 * 64 - 1, BATCH * SMALL**2 * 64 - 1
needs_interpreter = pytest.mark.skipif(DEVICE != "cpu", reason="runs in the interpreter; a GPU has the test below")


@needs_interpreter
def test_offsets_past_32_bits_forward(monkeypatch):
    pointers = dict.fromkeys(["low_ptr", "high_ptr", "gate_ptr", "out_ptr"], torch.float32)
    options = LARGE | {"GATED": True, "ROWS": 4, "COLUMNS": 16, "CHANNELS": 64, "ACC": tl.float32}
    programs = BATCH * SIDE**2 // 64
    # The kernel starts with the last image: its first program has the last tile.
    found = offsets_of_program(monkeypatch, kernels._upsample_add_fwd_kernel, 0, programs, pointers, **options)
    rows, columns = torch.arange(SIDE - 4, SIDE), torch.arange(SIDE - 16, SIDE)
    pixels = ((BATCH - 1) * SIDE + rows)[:, None] * SIDE + columns
    expected = (pixels[..., None] * 64 + torch.arange(64)).flatten()
    assert torch.equal(found["out_ptr"], expected)
    assert torch.equal(found["low_ptr"], expected)
    assert found["high_ptr"].max() == LAST_SMALL
    assert found["high_ptr"].min() == ((BATCH * SMALL - 3) * SMALL + SMALL - 9) * 64
    assert found["gate_ptr"].tolist() == list(range((BATCH - 1) * 64, BATCH * 64))


@needs_interpreter
def test_offsets_past_32_bits_backward(monkeypatch):
    pointers = dict.fromkeys(["d_out_ptr", "gate_ptr", "d_mean_ptr", "d_low_ptr", "d_high_ptr"], torch.float32)
    options = LARGE | {"GATED": True, "ROWS": 2, "COLUMNS": 16, "CHANNELS": 64, "ACC": tl.float32, "run": 4}
    programs = BATCH * SMALL**2 // 64
    found = offsets_of_program(
        monkeypatch, kernels._upsample_add_bwd_kernel, programs - 1, programs, pointers, **options
    )
    rows, columns = torch.arange(SMALL - 4, SMALL), torch.arange(SMALL - 16, SMALL)
    pixels = ((BATCH - 1) * SMALL + rows)[:, None] * SMALL + columns
    assert torch.equal(found["d_high_ptr"], (pixels[..., None] * 64 + torch.arange(64)).flatten())
    assert found["d_low_ptr"].max() == found["d_out_ptr"].max() == LAST
    assert found["d_low_ptr"].min() > found["d_out_ptr"].min() > LAST - 10 * SIDE * 64


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_more_than_2_to_the_31_elements():
    """The last image lies past 2^31: its result and gradients are those that it has alone."""
    shape = (3, 64, 3000, 4001, 1500, 2001)
    inputs = make_inputs(shape, torch.bfloat16)
    assert inputs[0].numel() > 2**31
    d_out = torch.randn_like(inputs[0])
    every, alone = run(upsample_add, inputs, d_out), run(upsample_add, [x[2:] for x in inputs], d_out[2:])
    for name in alone:
        assert torch.equal(every[name][2:], alone[name])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("channels", [21, 24, 512])
@pytest.mark.parametrize("small", [64, 32, 16])
def test_the_networks_own_shapes(small, channels):
    assert_no_worse_than(
        upsample_add_ref, upsample_add, make_inputs((2, channels, 128, 128, small, small), torch.bfloat16)
    )


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_cuda_graph():
    inputs = make_inputs((2, 24, 32, 32, 16, 16))
    upsample_add(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = upsample_add(*inputs)
    for x in inputs:
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, upsample_add(*inputs))
