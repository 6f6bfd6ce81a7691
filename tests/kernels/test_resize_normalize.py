"""resize_normalize: against the definition in float64, and against OpenCV, which it replaces."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfn_kernels import tuning
from dfn_kernels.common.triton_or_stub import tl
from dfn_kernels.images import resize_normalize as preprocess
from dfn_kernels.images.resize_normalize import resize_normalize, resize_normalize_ref
from support.addresses import offsets_of_program
from support.parity import DEVICE, DTYPES
from support.tiers import each_with_one_dtype, examples, slow

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Batch, height and width of the images; output size.
SHAPES = [
    (1, 1, 1, (1, 1)),  # one pixel
    (1, 1, 1, (3, 5)),  # one pixel everywhere
    (3, 5, 7, (9, 11)),  # all odd, enlarged
    (2, 9, 11, (5, 7)),  # all odd, shrunk
    (2, 8, 6, (4, 12)),  # exactly half one way, twice the other
    (1, 4, 300, (4, 256)),  # exactly one tile
    (1, 3, 200, (5, 257)),  # one past a tile in both directions
    (1, 2, 500, (2, 512)),  # the wider tile
    (1, 40, 50, (2, 3)),  # shrunk far: no antialiasing
    (2, 6, 9, (6, 9)),  # the same size
    (2, 6, 9, (6, 5)),  # the same in one direction
    (2, 6, 9, (7, 9)),
]


def make_images(B: int, H: int, W: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (B, H, W, 3), generator=generator, dtype=torch.uint8).to(DEVICE)


def assert_no_worse_than_definition(images: Tensor, size: tuple[int, int], flip: bool, dtype: torch.dtype) -> None:
    """The project's bound: at most twice the definition's error at that dtype, plus one eps of the largest value."""
    exact = resize_normalize_ref(images, size, MEAN, STD, flip=flip, dtype=torch.float64)
    theirs = resize_normalize_ref(images, size, MEAN, STD, flip=flip, dtype=dtype)
    ours = resize_normalize(images, size, MEAN, STD, flip=flip, dtype=dtype)
    assert ours.shape == exact.shape
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)
    error, baseline = ((x.double() - exact).abs().max().item() for x in (ours, theirs))
    bound = 2 * baseline + torch.finfo(dtype).eps * exact.abs().max().item()
    assert error <= bound, f"error {error:.2e}, bound {bound:.2e}"


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), each_with_one_dtype(SHAPES, DTYPES))
def test_matches_the_definition(backend, shape, flip, dtype):
    *image_shape, size = shape
    assert_no_worse_than_definition(make_images(*image_shape), size, flip, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_computes_in_float64(backend, shape):
    *image_shape, size = shape
    images = make_images(*image_shape)
    out = resize_normalize(images, size, MEAN, STD, flip=True, dtype=torch.float64)
    expected = resize_normalize_ref(images, size, MEAN, STD, flip=True, dtype=torch.float64)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 60])
def test_blocks_of_rows_meet(monkeypatch, shape, chunk):
    """The CPU path in blocks of one row, and of a few rows or images."""
    monkeypatch.setenv("DFN_KERNELS", "torch")
    monkeypatch.setattr(preprocess, "CPU_CHUNK", chunk)
    *image_shape, size = shape
    assert_no_worse_than_definition(make_images(*image_shape), size, True, torch.float32)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (23, 31, (48, 60)),  # enlarged
        (48, 64, (24, 32)),  # halved
        (45, 60, (21, 37)),  # shrunk, odd
        (130, 170, (9, 11)),  # shrunk far
        (30, 40, (30, 40)),
        (1, 9, (4, 4)),
    ],
)
def test_equals_opencv(backend, height, width, size):
    image = make_images(1, height, width)
    resized = cv2.resize(image[0].cpu().numpy().astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR)
    expected = (resized.astype(np.float64) / 255 - MEAN) / STD  # [h, w, 3]
    for flip in (False, True):
        out = resize_normalize(image, size, MEAN, STD, flip=flip).cpu().double().permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(out[0], expected, rtol=0, atol=1e-4)
        if flip:
            np.testing.assert_allclose(out[1], expected[:, ::-1], rtol=0, atol=1e-4)


def test_coordinates_are_exact_far_from_the_origin(backend):
    """In float32 a coordinate near 4000 is off by 1e-4 of a pixel; quotient and remainder of integers are not."""
    image = make_images(1, 1, 4099)
    out = resize_normalize(image, (1, 3001), MEAN, STD)
    exact = resize_normalize_ref(image, (1, 3001), MEAN, STD, dtype=torch.float64)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6)


def test_the_same_size_changes_no_pixel(backend):
    images = make_images(2, 5, 7)
    out = resize_normalize(images, (5, 7), (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
    assert torch.equal(out, images.permute(0, 3, 1, 2).float())


@pytest.mark.parametrize("size", [(5, 7), (8, 33), (3, 4)])
def test_the_second_half_is_the_mirrored_resize(backend, size):
    images = make_images(2, 5, 7)
    out = resize_normalize(images, size, MEAN, STD, flip=True)
    assert torch.equal(out[2:], out[:2].flip(-1))
    torch.testing.assert_close(out[2:], resize_normalize(images.flip(2), size, MEAN, STD), rtol=0, atol=2e-6)


LAYOUTS = {
    "contiguous": lambda x: x,
    "from [B, 3, H, W]": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "cut out": lambda x: torch.nn.functional.pad(x, (0, 0, 1, 2, 3, 1), value=200)[:, 3:-1, 1:-2],
    "without alpha": lambda x: torch.cat([x, 255 - x[..., :1]], -1)[..., :3],
    "BGR read backwards": lambda x: x.flip(-1).flip(-1),
    "one image for all": lambda x: x[:1].expand(len(x), -1, -1, -1),
    "unaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@examples(4, 15, data=st.data())
@pytest.mark.parametrize("path", ["triton", "torch"])
def test_any_size_and_layout(path, data):
    side = st.integers(1, 12)
    images = make_images(data.draw(st.integers(1, 3)), data.draw(side), data.draw(side), data.draw(st.integers(0, 9)))
    images = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFN_KERNELS", path)
        patch.setattr(preprocess, "CPU_CHUNK", data.draw(st.sampled_from([50, 2**18])))
        size, flip = (data.draw(side), data.draw(side)), data.draw(st.booleans())
        assert_no_worse_than_definition(images, size, flip, data.draw(st.sampled_from(DTYPES)))


def test_every_layout_is_read_right(backend):
    for name, layout in LAYOUTS.items():
        images = layout(make_images(2, 4, 5))
        expected = resize_normalize_ref(images.clone(memory_format=torch.contiguous_format), (3, 7), MEAN, STD)
        torch.testing.assert_close(
            resize_normalize(images, (3, 7), MEAN, STD), expected, rtol=0, atol=2e-6, msg=f"layout {name}"
        )


def test_behaves_like_a_pytorch_op(backend):
    images = make_images(1, 4, 5)
    for flip, dtype in ((True, torch.float16), (False, torch.float32)):
        torch.library.opcheck(preprocess._resize_normalize, (images, 3, 7, list(MEAN), list(STD), flip, dtype))


class Preprocess(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return resize_normalize(images, (6, 8), MEAN, STD, flip=True) * 2


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=slow)])
def test_compiled_equals_eager(monkeypatch, compiler):
    monkeypatch.setenv("DFN_KERNELS", "torch")
    images, module = make_images(2, 5, 7), Preprocess()
    expected = module(images)
    out = torch.compile(module, fullgraph=True, backend=compiler)(images)
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride()


def test_exports(monkeypatch):
    monkeypatch.setenv("DFN_KERNELS", "torch")
    images, module = make_images(2, 5, 7), Preprocess()
    torch.testing.assert_close(torch.export.export(module, (images,)).module()(images), module(images))


def test_autocast_changes_nothing(backend):
    images = make_images(1, 4, 5)
    expected = resize_normalize(images, (3, 7), MEAN, STD)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(resize_normalize(images, (3, 7), MEAN, STD), expected)


def test_two_runs_give_the_same_bits(backend):
    torch.use_deterministic_algorithms(True)  # an error where anything is not
    first, second = (resize_normalize(make_images(2, 4, 5), (3, 7), MEAN, STD, flip=True) for _ in range(2))
    assert torch.equal(first, second)


def test_inputs_are_left_alone(backend):
    for size in ((4, 5), (3, 7)):
        images = make_images(1, 4, 5)
        resize_normalize(images, size, MEAN, STD, flip=True)
        assert torch.equal(images, make_images(1, 4, 5))


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any floating-point result of an operator had outside of ``out``."""

    def __init__(self, out: Tensor):
        super().__init__()
        self.elements, self.storage = 0, out.untyped_storage().data_ptr()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if result.is_floating_point() and result.untyped_storage().data_ptr() != self.storage:
            self.elements = max(self.elements, result.numel())
        return result


def test_no_full_size_copies(monkeypatch):
    """The CPU path's largest floating-point tensor beside the output is a block of rows."""
    images, size, block = make_images(2, 60, 64), (90, 96), 2**11
    out = torch.empty(4, *size, 3).permute(0, 3, 1, 2)
    monkeypatch.setattr(preprocess, "CPU_CHUNK", block)
    with LargestTensor(out) as largest:
        preprocess._run_torch(images.cpu(), out, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    assert 0 < largest.elements <= block


def images_of(shape, dtype=torch.uint8) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (images_of((4, 5, 3)), {}, r"images \[B, H, W, 3\].*got shape \[4, 5, 3\]"),
        (images_of((1, 3, 4, 5)), {}, r"got shape \[1, 3, 4, 5\]"),
        (images_of((1, 0, 5, 3)), {}, "H and W at least 1"),
        (images_of((1, 4, 5, 3), torch.float32), {}, "uint8, got torch.float32"),
        (images_of((1, 4, 5, 3)), {"size": (0, 4)}, r"size \(h, w\), both at least 1, got \(0, 4\)"),
        (images_of((1, 4, 5, 3)), {"size": (4,)}, r"got \(4,\)"),
        (images_of((1, 4, 5, 3)), {"size": (2**28, 1)}, r"below 2\^30"),
        (images_of((1, 4, 5, 3)), {"mean": (0.5,)}, r"three values of mean and of std, got \[0.5\]"),
        (images_of((1, 4, 5, 3)), {"std": (1.0, 0.0, 1.0)}, "std above 0"),
        (images_of((1, 4, 5, 3)), {"mean": (123.7, 116.3, 103.5)}, r"0 .. 1.*got \[123.7"),
        (images_of((1, 4, 5, 3)), {"dtype": torch.uint8}, "dtype float32.*got torch.uint8"),
    ],
)
def test_names_what_is_wrong(backend, images, options, message):
    with pytest.raises(ValueError, match="resize_normalize expects.*" + message):
        resize_normalize(images, **{"size": (4, 4), "mean": MEAN, "std": STD} | options)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("size", [(512, 512), (896, 896), (375, 500)])
def test_on_a_gpu_at_full_size(triton_backend, size):
    """Right at real sizes, aligned and not; alike on replay from a CUDA graph."""
    images = make_images(4, 512, 512)
    assert_no_worse_than_definition(images, size, True, torch.bfloat16)
    expected = resize_normalize(images, size, MEAN, STD, flip=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = resize_normalize(images, size, MEAN, STD, flip=True)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="runs in the interpreter; a GPU has the test below")
@pytest.mark.parametrize("resize", [True, False])
def test_offsets_past_32_bits(monkeypatch, resize):
    """The last program of 1500 mirrored images: both images and output lie past 2^31."""
    batch, height, width, full = 1500, 700, 701, (997, 1001) if resize else (700, 701)
    tile = tuning.resize_normalize_tile(full[1])
    programs = 2 * batch * -(-full[0] // tile.rows) * -(-full[1] // tile.pixels)
    found = offsets_of_program(
        monkeypatch, preprocess._resize_normalize_kernel, programs - 1, programs,
        {"images_ptr": torch.uint8, "out_ptr": torch.float16}, batch=batch, in_height=height, in_width=width,
        height=full[0], width=full[1], SCALE=(1.0,) * 3, SHIFT=(0.0,) * 3, RESIZE=resize, ROWS=tile.rows,
        PIXELS=tile.pixels, ACC=tl.float32,
    )  # fmt: skip
    start = (full[1] - 1) // tile.pixels * tile.pixels
    band = torch.arange((full[0] - 1) // tile.rows * tile.rows, full[0])
    out = ((2 * batch - 1) * full[0] + band[:, None]) * full[1] + torch.arange(start, full[1])
    assert torch.equal(found["out_ptr"], (3 * out[..., None] + torch.arange(3)).flatten())
    assert found["out_ptr"].max() == 2 * batch * full[0] * full[1] * 3 - 1 > 2**31
    begin = (batch - 1) * height * width * 3
    assert begin > 2**31
    last = found["images_ptr"] - begin  # within the last image, whose mirror image's last columns are its first
    assert 0 <= last.min() <= last.max() < height * width * 3
    assert {last.max().item() // (3 * width), last.min().item() % (3 * width)} == {height - 1, 0}


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_more_than_two_to_the_31_elements(triton_backend):
    images = make_images(1, 4, 4).expand(3000, -1, -1, -1)
    out = resize_normalize(images, (500, 512), MEAN, STD, flip=True, dtype=torch.bfloat16)
    assert out.numel() > 2**31
    expected = resize_normalize(images[:1], (500, 512), MEAN, STD, flip=True, dtype=torch.bfloat16)
    for image, one in ((0, 0), (2999, 0), (3000, 1), (5999, 1)):
        assert torch.equal(out[image], expected[one])
