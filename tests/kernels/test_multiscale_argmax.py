"""multiscale_argmax: labels and mean probabilities against the definition in float64."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfn_kernels import tuning
from dfn_kernels.common.triton_or_stub import tl
from dfn_kernels.images import multiscale_argmax as multiscale
from dfn_kernels.images.multiscale_argmax import multiscale_argmax, multiscale_argmax_ref
from support.addresses import offsets_of_program
from support.parity import DEVICE, DTYPES
from support.tiers import each_with_one_dtype, examples, slow

# Batch, classes, sizes of the maps, which of them are flipped, the full size.
SHAPES = [
    (1, 1, [(1, 1)], [False], (1, 1)),  # one element
    (1, 3, [(1, 1)], [True], (4, 5)),  # one small pixel: the same score everywhere
    (2, 5, [(3, 4), (5, 3), (2, 7)], [False, True, True], (5, 13)),  # all odd, less than a tile
    (1, 21, [(2, 32)], [False], (3, 128)),  # exactly one tile of pixels
    (1, 21, [(2, 32), (2, 33)], [False, True], (2, 129)),  # one pixel past a tile
    (1, 33, [(3, 5)], [True], (2, 70)),  # each further block of classes has a tile of its own
    (1, 65, [(2, 3)], [False], (2, 40)),
    (2, 256, [(3, 2), (2, 2)], [False, True], (3, 33)),  # as many classes as labels can tell
    (2, 4, [(11, 9), (3, 20), (16, 2)], [True, False, True], (5, 7)),  # maps larger than the image in either direction
    (1, 2, [(6, 7), (1, 3), (3, 1)], [False, True, False], (6, 7)),  # a map of the full size; one row; one column
]


def make_maps(B, K, sizes, dtype=torch.float32, seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(B, K, *size, generator=generator)).to(DEVICE, dtype) for size in sizes]


def assert_decides_alike(maps: Sequence[Tensor], size: tuple[int, int], flipped: Sequence[bool]) -> None:
    """Probabilities by the project's bound: at most twice the float32 definition's error, plus one eps; labels equal
    wherever the best two classes are further apart than twice that bound, by which rounding may move either."""
    _, exact = multiscale_argmax_ref([x.double() for x in maps], size, flipped=flipped)
    _, theirs = multiscale_argmax_ref(maps, size, flipped=flipped)
    labels, scores = multiscale_argmax(maps, size, flipped=flipped, return_scores=True)
    assert scores.shape == exact.shape
    assert scores.dtype == theirs.dtype
    assert scores.is_contiguous(memory_format=torch.channels_last)
    eps = torch.finfo(scores.dtype).eps
    bound = 2 * (theirs.double() - exact).abs().max().item() + eps * exact.max().item()
    error = (scores.double() - exact).abs().max().item()
    assert error <= bound, f"error {error:.2e}, bound {bound:.2e}"

    assert labels.shape == (scores.shape[0], *size)
    assert labels.dtype == torch.uint8
    if exact.shape[1] > 1:
        best, second = exact.topk(2, dim=1).values.unbind(1)
        clear = best - second > 2 * bound
        assert clear.double().mean() > 0.9
        assert torch.equal(labels[clear].long(), exact.argmax(1)[clear])
    assert labels.long().max() < exact.shape[1]
    assert torch.equal(multiscale_argmax(maps, size, flipped=flipped), labels)


@pytest.mark.parametrize(("shape", "dtype"), each_with_one_dtype(SHAPES, DTYPES))
def test_matches_the_definition(backend, shape, dtype):
    B, K, sizes, flipped, size = shape
    assert_decides_alike(make_maps(B, K, sizes, dtype), size, flipped)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_computes_in_float64_where_a_map_is(backend, shape):
    B, K, sizes, flipped, size = shape
    maps = make_maps(B, K, sizes)
    maps[0] = maps[0].double()
    labels, scores = multiscale_argmax(maps, size, flipped=flipped, return_scores=True)
    expected_labels, expected = multiscale_argmax_ref([x.double() for x in maps], size, flipped=flipped)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-14)
    assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 200])
def test_blocks_of_rows_meet(monkeypatch, shape, chunk):
    """The CPU path in blocks of one row, and of a few."""
    monkeypatch.setenv("DFN_KERNELS", "torch")
    monkeypatch.setattr(multiscale, "CPU_CHUNK", chunk)
    B, K, sizes, flipped, size = shape
    assert_decides_alike(make_maps(B, K, sizes), size, flipped)


def test_maps_of_several_dtypes(backend):
    maps = make_maps(2, 7, [(3, 5), (4, 6), (6, 9)])
    assert_decides_alike([maps[0], maps[1].half(), maps[2].to(DTYPES[-1])], (5, 17), [False, True, False])


def padded(x: Tensor) -> Tensor:
    """x as the first classes of a channels_last map with three more, as a padded head gives it."""
    more = torch.cat([x, torch.full_like(x[:, :3], 50.0)], 1).contiguous(memory_format=torch.channels_last)
    return more[:, : x.shape[1]]


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "padded classes": padded,
    "every other pixel": lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, ::2, ::2],
    "one image for all": lambda x: x[:1].expand(len(x), -1, -1, -1),
    "one row for all": lambda x: x[:, :, :1].expand(-1, -1, x.shape[2], -1),
    "transposed": lambda x: x.mT.contiguous().mT,
}


@examples(4, 15, data=st.data())
@pytest.mark.parametrize("path", ["triton", "torch"])
def test_any_number_of_maps_of_any_layout(path, data):
    K, B = data.draw(st.sampled_from([1, 2, 3, 21])), data.draw(st.integers(1, 2))
    side = st.integers(1, 9)
    maps, flipped = [], []
    for seed in range(data.draw(st.integers(1, 3))):
        x = make_maps(B, K, [(data.draw(side), data.draw(side))], data.draw(st.sampled_from(DTYPES)), seed)[0]
        maps.append(LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](x))
        flipped.append(data.draw(st.booleans()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFN_KERNELS", path)
        patch.setattr(multiscale, "CPU_CHUNK", data.draw(st.sampled_from([30, 2**18])))
        assert_decides_alike(maps, (data.draw(st.integers(1, 4)), data.draw(side)), flipped)


def test_every_layout_is_read_right(backend):
    for name, layout in LAYOUTS.items():
        x = layout(make_maps(2, 5, [(3, 6)])[0])
        expected = multiscale_argmax_ref([x.clone(memory_format=torch.contiguous_format)], (2, 11))[1]
        scores = multiscale_argmax([x], (2, 11), return_scores=True)[1]
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("K", [2, 21, 256])
def test_ties_go_to_the_lower_class(backend, K):
    maps = make_maps(1, K, [(3, 4), (4, 5)])
    half = (K + 1) // 2
    for x in maps:
        x[:, half:] = x[:, : K - half].clone()  # each class of the upper half is the twin of one of the lower
    size, flipped = (3, 30), [False, True]
    labels = multiscale_argmax(maps, size, flipped=flipped)
    assert labels.max() < half
    assert torch.equal(multiscale_argmax([torch.zeros_like(x) for x in maps], size), torch.zeros_like(labels))


def test_a_flipped_map_counts_mirrored(backend):
    """Scores that grow to the right in the mirrored image grow to the left in the image."""
    ramp = torch.linspace(-1, 1, 5, device=DEVICE).expand(1, 1, 2, 5)
    x = torch.cat([ramp, -ramp], 1)
    right = torch.tensor([[1, 1, 1, 0, 0, 0]], dtype=torch.uint8, device=DEVICE).expand(1, 2, 6)
    assert torch.equal(multiscale_argmax([x], (2, 6)), right)
    assert torch.equal(multiscale_argmax([x], (2, 6), flipped=[True]), right.flip(-1))


def test_nan_scores_give_a_class(backend):
    """Garbage in, a label out, but one of the classes: 0. Other images are as ever."""
    x = make_maps(2, 5, [(4, 4)])[0]
    x[0, 3] = math.nan
    labels, scores = multiscale_argmax([x], (4, 4), return_scores=True)
    assert scores[0].isnan().all()
    assert (labels[0] == 0).all()
    assert torch.equal(labels[1].long(), x[1].argmax(0))


def test_sizes_do_not_specialise():
    """Triton compiles anew for integers that are 1 or divisible by 16: sizes and strides must be neither."""
    for number in (0, 1, 7, 16, 1024, 2**31):
        hidden = multiscale._opaque(number)
        assert hidden > 1
        assert hidden % 16
        assert (hidden - 3) >> 1 == number


def operands(seed: int = 0) -> tuple:
    return make_maps(1, 4, [(3, 5), (4, 4)], seed=seed), 4, 9, [False, True]


def test_behaves_like_a_pytorch_op(backend):
    torch.library.opcheck(multiscale._multiscale_argmax, operands())
    torch.library.opcheck(multiscale._multiscale_scores, operands())


class Decision(nn.Module):
    def __init__(self, return_scores: bool):
        super().__init__()
        self.return_scores = return_scores

    def forward(self, low: Tensor, high: Tensor):
        return multiscale_argmax([low * 2, high], (7, 9), flipped=[False, True], return_scores=self.return_scores)


@pytest.mark.parametrize(
    ("return_scores", "compiler"),
    [(False, "aot_eager"), (True, "aot_eager"), pytest.param(True, "inductor", marks=slow)],
)
def test_compiled_equals_eager(monkeypatch, return_scores, compiler):
    monkeypatch.setenv("DFN_KERNELS", "torch")
    maps, module = make_maps(2, 4, [(3, 5), (4, 4)]), Decision(return_scores)
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(*maps), module(*maps))


@pytest.mark.parametrize("return_scores", [False, True])
def test_exports(monkeypatch, return_scores):
    monkeypatch.setenv("DFN_KERNELS", "torch")
    maps, module = make_maps(2, 4, [(3, 5), (4, 4)]), Decision(return_scores)
    torch.testing.assert_close(torch.export.export(module, tuple(maps)).module()(*maps), module(*maps))


def test_computes_in_float32_under_autocast(backend):
    maps, height, width, flipped = operands()
    expected = multiscale_argmax(maps, (height, width), flipped=flipped, return_scores=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same_bits(multiscale_argmax(maps, (height, width), flipped=flipped, return_scores=True), expected)


def assert_same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_two_runs_give_the_same_bits(backend):
    torch.use_deterministic_algorithms(True)  # an error where anything is not
    first, second = (
        multiscale_argmax(maps, (height, width), flipped=flipped, return_scores=True)
        for maps, height, width, flipped in (operands(), operands())
    )
    assert_same_bits(first, second)


def test_inputs_are_left_alone(backend):
    maps, height, width, flipped = operands()
    copies = [x.clone() for x in maps]
    multiscale_argmax(maps, (height, width), flipped=flipped, return_scores=True)
    assert_same_bits(maps, copies)


def test_has_no_gradient_and_says_so(backend):
    maps = [x.requires_grad_() for x in make_maps(1, 3, [(2, 2)])]
    labels, scores = multiscale_argmax(maps, (4, 4), return_scores=True)
    assert not labels.requires_grad
    with pytest.raises(RuntimeError, match="multiscale_argmax has no gradient"):
        scores.sum().backward()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any result of an operator had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_full_size_map_of_all_classes(monkeypatch):
    """The CPU path's largest tensor is a block, however large the image; the definition needs K numbers a pixel."""
    B, K, size, block = 1, 21, (256, 128), 2**15
    maps, labels = make_maps(B, K, [(64, 32), (16, 8)]), torch.empty(B, *size, dtype=torch.uint8, device=DEVICE)
    monkeypatch.setattr(multiscale, "CPU_CHUNK", block)
    with LargestTensor() as largest:
        multiscale._run_torch(maps, *size, [False, True], labels, None)
    assert 0 < largest.elements <= max(block, labels.numel(), maps[0].numel())
    with LargestTensor() as largest:
        multiscale_argmax_ref(maps, size)
    assert largest.elements >= K * size[0] * size[1]


def zeros(*shape, dtype=torch.float32, device=DEVICE) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("maps", "size", "options", "message"),
    [
        ([], (4, 4), {}, "one or more score maps"),
        (zeros(1, 2, 3, 3), (4, 4), {}, "a list of one or more score maps, got Tensor"),
        ([zeros(2, 3, 3)], (4, 4), {}, r"logits\[0\] \[B, K, h, w\].*got shape \[2, 3, 3\]"),
        ([zeros(1, 2, 3, 0)], (4, 4), {}, "all but B at least 1"),
        ([zeros(1, 2, 3, 3), zeros(1, 3, 3, 3)], (4, 4), {}, r"logits\[1\] like logits\[0\].*\[1, 2\].*got \[1, 3\]"),
        ([zeros(1, 2, 3, 3), zeros(2, 2, 3, 3)], (4, 4), {}, r"got \[2, 2\]"),
        ([zeros(1, 2, 3, 3), zeros(1, 2, 3, 3, device="meta")], (4, 4), {}, "on meta"),
        ([zeros(1, 2, 3, 3, dtype=torch.int32)], (4, 4), {}, "got torch.int32"),
        ([zeros(1, 257, 1, 1)], (4, 4), {}, "at most 256 classes.*got 257"),
        ([zeros(1, 2, 3, 3)], (4, 0), {}, r"size \(H, W\), both at least 1, got \(4, 0\)"),
        ([zeros(1, 2, 3, 3)], (4, 4, 4), {}, r"got \(4, 4, 4\)"),
        ([zeros(1, 2, 3, 3)], (2**30, 4), {}, r"below 2\^31"),
        ([zeros(1, 2, 3, 3)], (4, 4), {"flipped": [True, False]}, "each of 1 maps, got 2"),
    ],
)
def test_names_what_is_wrong(backend, maps, size, options, message):
    with pytest.raises(ValueError, match="multiscale_argmax expects.*" + message):
        multiscale_argmax(maps, size, **options)


def test_a_thread_holds_few_classes():
    """At most 32 sums a thread: more would not leave registers for the four corners of a pixel."""
    for K in range(1, 257):
        tile = tuning.multiscale_argmax_tile(K, 4)
        assert tuning.power_of_two(K) * tile.pixels <= 32 * 32 * tile.num_warps
        assert tuning.multiscale_argmax_tile(K, 8).pixels * 2 == tile.pixels


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_on_a_gpu_at_full_size(triton_backend):
    """Five scales with flip at 512 x 512: right, alike on replay from a CUDA graph, and without full-size maps."""
    scales = [(64, 64), (96, 96), (128, 128), (192, 192), (224, 224)]
    sizes = [size for size in scales for _ in range(2)]
    maps, flipped = make_maps(2, 21, sizes, torch.bfloat16), [False, True] * 5
    maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    assert_decides_alike(maps, (512, 512), flipped)
    expected = multiscale_argmax(maps, (512, 512), flipped=flipped)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        labels = multiscale_argmax(maps, (512, 512), flipped=flipped)
    assert torch.cuda.max_memory_allocated() - before < 4 * expected.numel()
    labels.zero_()
    graph.replay()
    assert torch.equal(labels, expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="runs in the interpreter")
def test_offsets_past_32_bits(monkeypatch):
    """The last program of 60 images: the last corner of each map, of the labels and of the scores, all past 2^31."""
    batch, classes, full, sides = 60, 21, 6000, ((1500, 1400), (1300, 1501))
    tile = tuning.multiscale_argmax_tile(classes, 4)
    programs = batch * full * -(-full // tile.pixels)
    numbers = {
        "heights": [h for h, _ in sides], "widths": [w for _, w in sides], "strides": [classes] * 2, "flips": [0, 1]
    }  # fmt: skip
    found = offsets_of_program(
        monkeypatch, multiscale._multiscale_argmax_kernel, programs - 1, programs,
        {"map_ptrs": (torch.float16, torch.float32), "labels_ptr": torch.uint8, "scores_ptr": torch.float32},
        **{name: tuple(map(multiscale._opaque, values)) for name, values in numbers.items()},
        height=full, width=full, KINDS=(0, 1), TYPES=(tl.float16, tl.float32), SCORES=True, K=classes,
        CLASSES=tuning.power_of_two(classes), PIXELS=tile.pixels, ACC=tl.float32,
    )  # fmt: skip
    start = (full - 1) // tile.pixels * tile.pixels
    labels = (batch * full - 1) * full + torch.arange(start, full)
    assert torch.equal(found["labels_ptr"], labels)
    assert torch.equal(found["scores_ptr"], (labels[:, None] * classes + torch.arange(classes)).flatten())
    for i, (h, w) in enumerate(sides):
        column, length = torch.arange(start, full), full - 1
        left = (length - column if i else column) * (w - 1) // length  # the second map is of mirrored images
        columns = torch.cat([left, (left + 1).clamp(max=w - 1)]).unique()
        row = (batch * h - 1) * w + columns  # the last row of the image is the last one of the map
        expected = (row[:, None] * classes + torch.arange(classes)).flatten()
        assert torch.equal(found[f"map_ptrs[{i}]"], expected)
        assert expected.min() > 2**31
