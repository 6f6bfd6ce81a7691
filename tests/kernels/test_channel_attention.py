"""channel_attention: the CAB of the paper, against the definition in float64, output and all six gradients."""

from math import prod

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from dfn_kernels import tuning
from dfn_kernels.attention import channel_attention_triton as kernels
from dfn_kernels.attention.channel_attention import channel_attention, channel_attention_ref
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
    (5, 24, 4, 32, 2, 16),  # factor 2, exactly one tile of columns, one image past a tile of the linear layers
    (1, 16, 16, 16, 1, 1),  # global context: one pixel to all
    (1, 34, 3, 17, 2, 9),  # one small column past a tile, more than one block of channels
    (2, 8, 17, 33, 2, 16),  # several parts, the last one shorter; some have no row of high
    (1, 9, 3, 4, 5, 7),  # high is the larger one
    (1, 6, 1, 7, 4, 3),  # one row
    (1, 16, 5, 7, 5, 7),  # no resize
]
OPERATOR = torch.ops.dfn_kernels.channel_attention.default


def make_inputs(shape, dtype=torch.float32, parameters=None) -> list[Tensor]:
    """low, high, and random weights and biases in the dtype ``parameters``; features are not centred on 0, so that
    their means count."""
    B, C, H, W, h, w = shape
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*size: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return mean + std * torch.randn(size, generator=generator, device=DEVICE)

    low, high = random(B, C, H, W, mean=0.5), random(B, C, h, w, mean=-0.5)
    layers = [random(C, 2 * C, std=C**-0.5), random(C), random(C, C, std=C**-0.5), random(C)]
    features = [x.to(dtype, memory_format=torch.channels_last) for x in (low, high)]
    return features + [x.to(parameters or dtype) for x in layers]


@pytest.mark.parametrize(("shape", "dtype"), each_with_one_dtype(SHAPES, DTYPES))
def test_matches_the_definition(backend, shape, dtype):
    assert_no_worse_than(channel_attention_ref, channel_attention, make_inputs(shape, dtype))


@pytest.mark.parametrize("dtype", [x for x in DTYPES if x != torch.float32], ids=str)
def test_half_precision_features_and_float32_parameters(backend, dtype):
    """As under autocast: gradients come in each input's own dtype."""
    inputs = make_inputs((2, 24, 4, 10, 2, 5), dtype, torch.float32)
    assert_no_worse_than(channel_attention_ref, channel_attention, inputs)
    dtypes = [x.dtype for x in run(channel_attention, inputs).values()]
    assert dtypes == [dtype] * 3 + [torch.float32] * 4


@pytest.mark.parametrize(
    "shape", [pytest.param(shape, marks=slow if prod(shape) > 100_000 else []) for shape in SHAPES], ids=str
)
def test_float64(backend, shape):
    """Exact to rounding: coordinates, weights and means have no error of their own."""
    inputs = make_inputs(shape, torch.float64)
    ours, expected = run(channel_attention, inputs), run(channel_attention_ref, inputs)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-12, atol=1e-12)


@examples(2, 12, data=st.data())
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_any_shape_dtype_and_layout(name, data):
    size = st.integers(1, 6)
    shape = data.draw(st.tuples(st.integers(1, 2), size, size, size, size, size))
    layouts = data.draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 2))
    d_out = data.draw(st.sampled_from(LAYOUTS))
    dtype = data.draw(st.sampled_from([torch.float64, *DTYPES[1:]]))
    inputs = make_inputs(shape, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFN_KERNELS", name)
        ref, fn = (with_layouts(x, layouts, d_out) for x in (channel_attention_ref, channel_attention))
        if dtype != torch.float64:
            assert_no_worse_than(ref, fn, inputs)
            return
        ours, expected = run(fn, inputs), run(ref, inputs)
        for key in expected:
            torch.testing.assert_close(ours[key], expected[key], rtol=1e-12, atol=1e-12)


def test_parameters_may_be_transposed_views(backend):
    inputs = make_inputs((2, 6, 5, 4, 3, 2))
    expected = run(channel_attention, inputs)
    views = [inputs[0], inputs[1], *[x.t().contiguous().t() for x in inputs[2:]]]
    for name, x in run(channel_attention, views).items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=0)


def test_one_program_may_walk_down_many_rows(triton_backend, monkeypatch):
    """More small rows than one run, and a last run that is shorter."""
    monkeypatch.setattr(tuning, "PROGRAMS", 1)
    assert_no_worse_than(channel_attention_ref, channel_attention, make_inputs((2, 8, 25, 5, 11, 3)))


def test_output_and_gradients_are_channels_last(backend):
    for name, x in run(channel_attention, make_inputs((2, 8, 6, 8, 3, 4), torch.float16)).items():
        assert x.is_contiguous(memory_format=torch.channels_last) or x.ndim < 4, name


def test_gate_saturates_without_nan(backend):
    inputs = make_inputs((1, 8, 4, 4, 2, 2))
    inputs[5] = torch.full_like(inputs[5], 200.0)
    inputs[5][::2] = -200.0
    out = run(channel_attention, inputs)
    high = channel_attention_ref(torch.zeros_like(inputs[0]), *inputs[1:])
    torch.testing.assert_close(out["out"][:, ::2], high[:, ::2])
    torch.testing.assert_close(out["out"][:, 1::2], (inputs[0] + high)[:, 1::2])
    assert all(x.isfinite().all() for x in out.values())


def test_nan_is_not_hidden(backend):
    """A feature that is nan makes its image's gates nan, and leaves the others alone."""
    inputs = make_inputs((2, 8, 4, 4, 2, 2))
    inputs[0][1, 3, 2, 2] = torch.nan
    out = channel_attention(*inputs)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_behaves_like_a_pytorch_op(backend):
    torch.library.opcheck(OPERATOR, [x.requires_grad_() for x in make_inputs((2, 3, 3, 4, 2, 2))])


def test_opcheck_of_mixed_dtypes(monkeypatch):
    monkeypatch.setenv("DFN_KERNELS", "torch")
    inputs = make_inputs((2, 3, 5, 4, 3, 2), torch.bfloat16, torch.float32)
    torch.library.opcheck(OPERATOR, [x.requires_grad_() for x in inputs])


def test_gradcheck(backend):
    inputs = [x.requires_grad_() for x in make_inputs((1, 2, 3, 4, 2, 3), torch.float64)]
    assert torch.autograd.gradcheck(channel_attention, inputs, fast_mode=backend == "triton")
    assert torch.autograd.gradcheck(lambda *x: OPERATOR(*x)[0], inputs, fast_mode=backend == "triton")


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=slow)])
def test_compiled_equals_eager(monkeypatch, compiler):
    monkeypatch.setenv("DFN_KERNELS", "torch")
    inputs = make_inputs((2, 8, 7, 9, 3, 4))
    compiled = torch.compile(channel_attention, fullgraph=True, backend=compiler)
    ours, expected = run(compiled, inputs), run(channel_attention, inputs)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-6, atol=1e-6)


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2 * channels, channels), nn.Linear(channels, channels)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        parameters = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return channel_attention(low.relu(), high, *parameters)


def test_exports_with_any_size(monkeypatch):
    """The operator stays one node of the graph, for sizes that the example did not have."""
    monkeypatch.setenv("DFN_KERNELS", "torch")
    block = Block(3).to(DEVICE)
    dynamic = torch.export.Dim.AUTO
    shapes = {name: {0: dynamic, 2: dynamic, 3: dynamic} for name in ("low", "high")}
    program = torch.export.export(block, tuple(make_inputs((2, 3, 6, 8, 3, 4))[:2]), dynamic_shapes=shapes)
    assert [node.target for node in program.graph.nodes].count(OPERATOR) == 1
    inputs = make_inputs((2, 3, 9, 7, 4, 5))[:2]
    torch.testing.assert_close(program.module()(*inputs), block(*inputs))


def test_autocast_leaves_gate_and_dtypes(backend):
    """The linear layers run in float32, forward and backward, though autocast would have them in bfloat16."""
    inputs = make_inputs((1, 8, 5, 6, 3, 3))
    expected = run(channel_attention, inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = run(channel_attention, inputs)
    for name, x in ours.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-6, atol=1e-6)


def test_two_runs_give_the_same_bits(backend):
    inputs = make_inputs((2, 24, 5, 7, 3, 4))
    torch.use_deterministic_algorithms(DEVICE == "cpu" or backend == "triton")  # on CUDA PyTorch's own has no such form
    first, second = run(channel_attention, inputs), run(channel_attention, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cpu_path_concatenates_nothing(monkeypatch, dtype):
    """Forward makes its result, and little besides; backward the gradients of low and high, and one chunk's product."""
    monkeypatch.setenv("DFN_KERNELS", "torch")
    inputs = [x.cpu() for x in make_inputs((8, 64, 64, 64, 32, 32), dtype, torch.float32)]
    n, chunk = inputs[0].nbytes, 2**20 * 4
    assert Allocations(lambda: channel_attention(*inputs)).peak < 1.1 * n + 2 * chunk
    out = channel_attention(*[x.requires_grad_() for x in inputs])
    d_out = torch.randn_like(out)
    assert Allocations(lambda: torch.autograd.grad(out, inputs, d_out)).peak < 1.6 * n + 3 * chunk


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"high": torch.zeros(2, 4, 2, 2)}, r"B and C of low, got high \[2, 4, 2, 2\] and low \[2, 3, 4, 4\]"),
        ({"low": torch.zeros(3, 4, 4)}, r"low \[B, C, H, W\], all but B at least 1, got shape \[3, 4, 4\]"),
        ({"high": torch.zeros(2, 3, 2, 2).half()}, "high like low.*got torch.float16"),
        ({"fc1_weight": torch.zeros(3, 3)}, r"fc1_weight \[3, 6\] for 3 channels, got \[3, 3\]"),
        ({"fc1_bias": torch.zeros(1)}, r"fc1_bias \[3\] for 3 channels, got \[1\]"),
        ({"fc2_weight": torch.zeros(3, 6)}, r"fc2_weight \[3, 3\] for 3 channels, got \[3, 6\]"),
        ({"fc2_bias": torch.zeros(3, 1)}, r"fc2_bias \[3\] for 3 channels, got \[3, 1\]"),
        (
            {"fc2_weight": torch.zeros(3, 3).half()},
            r"fc2_weight .*like fc1_weight \(torch.float32\).*got torch.float16",
        ),
        ({"fc1_weight": torch.zeros(3, 6).long()}, "fc1_weight floating-point.*got torch.int64"),
        ({"fc2_bias": torch.zeros(3, device="meta")}, "fc2_bias .*on low's device.*got torch.float32 on meta"),
    ],
)
def test_errors_name_what_is_wrong(changes, message):
    shapes = {"low": (2, 3, 4, 4), "high": (2, 3, 2, 2)}
    shapes |= {"fc1_weight": (3, 6), "fc1_bias": (3,), "fc2_weight": (3, 3), "fc2_bias": (3,)}
    inputs = {name: torch.zeros(shape) for name, shape in shapes.items()} | changes
    with pytest.raises(ValueError, match=f"channel_attention expects .*{message}"):
        channel_attention(**inputs)


def test_coordinates_past_32_bits_are_an_error(triton_backend):
    inputs = make_inputs((1, 1, 1, 1, 1, 1))
    inputs[:2] = (inputs[i].expand(1, 1, 2, width) for i, width in enumerate((2**27, 8)))
    with pytest.raises(ValueError, match=r"channel_attention expects .*got 2 x 134217728"):
        channel_attention(*inputs)


@pytest.mark.skipif(DEVICE != "cpu", reason="runs in the interpreter; a GPU has the test below")
def test_offsets_past_32_bits(monkeypatch):
    """The last part of the last image of 1.3e10 elements; the shared kernels are in test_upsample_add."""
    batch, C, side, small, share = 3, 64, 8192, 4096, 64
    parts = side**2 // share
    sizes = {"height": side, "width": side, "share": share, "parts": parts, "groups": C // 8, "VECTOR": 8}
    tile = {"PIXELS": 32, "CHANNELS": 64, "ACC": tl.float32}
    last = batch * side**2 * C - 1
    for kernel, names, width in (
        (kernels._mean_fwd_kernel, ("low_ptr", "high_ptr", "partial_ptr"), 2 * C),
        (kernels._gate_bwd_kernel, ("d_out_ptr", "low_ptr", "partial_ptr"), C),
    ):
        extra = {"small_height": small, "small_width": small} if kernel is kernels._mean_fwd_kernel else {}
        programs, pointers = batch * parts, dict.fromkeys(names, torch.float32)
        with monkeypatch.context() as patch:
            found = offsets_of_program(patch, kernel, programs - 1, programs, pointers, **sizes, **extra, **tile)
        for name in {"low_ptr", "d_out_ptr"} & found.keys():
            assert found[name].tolist() == list(range(last - share * C + 1, last + 1))
        assert found["partial_ptr"].tolist() == list(range((programs - 1) * width, programs * width))
