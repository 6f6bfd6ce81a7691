"""FusedDFN against its source network: the same in float64, close in float32, nearly the same labels in bf16."""

import copy
import dataclasses
import pickle
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfn_fast import FastDFN, ReferenceDFN
from dfn_fast.config import recipe
from dfn_fast.data.border import border_targets
from dfn_fast.data.loader import Batch
from dfn_fast.data.normalize import normalize
from dfn_fast.data.registry import build_dataset
from dfn_fast.network.blocks import resize
from dfn_fast.network.fused import FusedDFN
from dfn_fast.network.fused_blocks import Convolution
from dfn_fast.trainer.trainer import Trainer
from dfn_kernels import tuning
from support.networks import VARIANT_NAMES, VARIANTS, batch, narrow_backbones, random_dfn

STEPS = 60


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """Narrows the backbones: the published ResNet-18 and 50 would take most of the time."""
    with narrow_backbones():
        yield


@pytest.fixture(params=["direct", "winograd"])
def algorithm(request, monkeypatch):
    """Forces Winograd's algorithm in one case: it would not be chosen at these sizes."""
    if request.param == "winograd":
        monkeypatch.setattr(tuning, "winograd_tile", lambda *shape, **options: 4)


def border_of(fused: FusedDFN, data: torch.Tensor) -> torch.Tensor:
    return resize(fused.border_scores(fused.stages(data)), data.shape[2:])


@pytest.mark.parametrize(("settings", "size"), VARIANTS, ids=VARIANT_NAMES)
@pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])
@torch.no_grad()
def test_is_the_network_in_float64(settings, size, plain, algorithm):
    model, data = random_dfn(**settings).eval(), batch(size)[0]
    fused = FusedDFN(model, return_border=model.has_border, plain=plain)
    torch.testing.assert_close(fused(data), model(data), rtol=1e-10, atol=1e-10)
    if model.has_border:
        torch.testing.assert_close(border_of(fused, data), model.scores(data).border[-1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("settings", "size"), VARIANTS, ids=VARIANT_NAMES)
@pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])
@torch.no_grad()
def test_float32_is_within_1e_4_of_the_range(settings, size, plain, algorithm):
    model, data = random_dfn(**settings).eval(), batch(size)[0]
    expected = model(data)
    ours = FusedDFN(model, dtype=torch.float32, plain=plain)(data)
    assert ours.dtype == torch.float32
    assert (ours - expected).abs().max() < 1e-4 * (expected.max() - expected.min())


@torch.no_grad()
def test_oneDNN_and_winograd_are_reached():  # noqa: N802
    """On a CPU in float32, each convolution packs its weight for one of the two and reuses it."""
    model = ReferenceDFN(3, backbone="resnet18", channels=256, border=False).eval()
    fused, data = FusedDFN(model), torch.randn(1, 3, 128, 128)
    fused(data)
    kept = [m.packed for m in fused.modules() if isinstance(m, Convolution)]
    assert any(packed.winograd for packed in kept)
    assert all(packed.winograd or packed.onednn for packed in kept)
    before = [packed.onednn | packed.winograd for packed in kept]
    fused(data)
    after = [packed.onednn | packed.winograd for packed in kept]
    assert [list(a) for a in after] == [list(b) for b in before]
    assert all(a[key] is b[key] for a, b in zip(after, before, strict=True) for key in a)


def test_the_model_stays_untouched_and_independent():
    model, data = random_dfn().train(), batch((40, 48))[0]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        fused = FusedDFN(model)
        first = fused(data)
        assert model.training
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        for parameter in model.parameters():
            parameter.add_(1)
        assert torch.equal(fused(data), first)
        assert not torch.allclose(FusedDFN(model)(data), first)


def test_has_no_parameters_and_stays_in_eval_mode():
    fused = FusedDFN(random_dfn()).train()
    assert not list(fused.parameters())
    assert not any(module.training for module in fused.modules())


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda fused: pickle.loads(pickle.dumps(fused))], ids=["copy", "pickle"]
)
@torch.no_grad()
def test_copies(clone):
    model, data = ReferenceDFN(3, backbone="resnet18", channels=16).eval(), torch.randn(1, 3, 40, 48)
    fused = FusedDFN(model)
    expected = fused(data)
    torch.testing.assert_close(clone(fused)(data), expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_another_dtype_takes_other_packed_weights():
    """Weights packed for float32 must not be used for bfloat16."""
    model, data = ReferenceDFN(3, backbone="resnet18", channels=16).eval(), torch.randn(1, 3, 40, 48)
    fused = FusedDFN(model)
    fused(data)
    fused.cast(torch.bfloat16)
    assert fused.dtype == torch.bfloat16
    expected = FusedDFN(model, dtype=torch.bfloat16)(data)
    torch.testing.assert_close(fused(data), expected, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_norms_that_cannot_be_folded_stay():
    model = ReferenceDFN(5, backbone="resnet18", channels=16, norm_layer=lambda c: nn.GroupNorm(1, c)).double().eval()
    data = batch((40, 48))[0]
    for plain in (False, True):
        torch.testing.assert_close(FusedDFN(model, plain=plain)(data), model(data), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_sync_batch_norm_folds():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(random_dfn()).eval()
    data = batch((40, 48))[0]
    plain = random_dfn().eval()
    torch.testing.assert_close(FusedDFN(model)(data), plain(data), rtol=1e-10, atol=1e-10)


def test_runs_one_head_and_less_arithmetic():
    from torch.utils.flop_counter import FlopCounterMode

    model = FastDFN(21, backbone="resnet101").eval()
    data = torch.randn(1, 3, 64, 64)
    counts = []
    with torch.no_grad():
        for network in (FusedDFN(model, plain=True), ReferenceDFN(21, backbone="resnet101").eval()):
            with FlopCounterMode(display=False) as counter:
                network(data)
            counts.append(counter.get_total_flops())
    assert counts[0] < 0.91 * counts[1]


def test_errors_say_what_is_missing():
    model = random_dfn(border=False)
    with pytest.raises(ValueError, match="border=False"):
        FusedDFN(model, return_border=True)
    fused, data = FusedDFN(model), batch((40, 48))[0]
    with pytest.raises(ValueError, match="return_border=True"):
        fused.border_scores(fused.stages(data))
    with pytest.raises(ValueError, match=r"at least 32, got \[1, 3, 31, 40\]"):
        fused(torch.zeros(1, 3, 31, 40))


@pytest.mark.slow
def test_bf16_keeps_more_labels_than_autocast_does():
    """With briefly trained weights, our bf16 changes no more labels than PyTorch's own."""
    config = dataclasses.replace(recipe("synthetic"), amp="off", batch_size=8, compile=False)
    train, val = (build_dataset("synthetic", None, split) for split in ("train", "val"))
    torch.manual_seed(0)
    trainer = Trainer(FastDFN(8, **config.network_arguments()), config, STEPS, torch.device("cpu"))
    for step in range(STEPS):
        samples = [train[8 * step + i] for i in range(8)]
        images = torch.from_numpy(np.stack([s.image[:64, :64] for s in samples])).permute(0, 3, 1, 2)
        labels = np.stack([s.label[:64, :64] for s in samples])
        borders = np.stack([border_targets(label, 5) for label in labels])
        trainer.step([Batch(images, torch.from_numpy(labels), torch.from_numpy(borders), [])], step)
    model = trainer.model.eval()
    data = normalize(torch.from_numpy(np.stack([val[i].image for i in range(8)])).permute(0, 3, 1, 2))
    with torch.inference_mode():
        exact = model(data).argmax(1)
        with torch.autocast("cpu", torch.bfloat16):
            theirs = (model(data).argmax(1) != exact).float().mean().item()
        ours = (FusedDFN(model, dtype=torch.bfloat16)(data).argmax(1) != exact).float().mean().item()
    assert len(exact.unique()) > 3
    assert 0 < ours <= theirs < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_on_a_gpu(dtype):
    """cuDNN's fused calls must not read old output memory, which is filled with nan before each run."""
    model = random_dfn().eval()
    data = batch((64, 96))[0]
    expected = model(data)
    fused = FusedDFN(model.float().cuda(), dtype=dtype)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for _ in range(3):
            junk = [torch.full((2**22,), float("nan"), device="cuda") for _ in range(8)]
            del junk
            ours = fused(data.float().cuda()).cpu()
    scale = expected.max() - expected.min()
    assert (ours - expected).abs().max() < (1e-4 if dtype == torch.float32 else 5e-2) * scale


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_fused_conv_on_a_gpu(residual, relu):
    from dfn_kernels.convolution.fused_conv import fused_conv, fused_conv_ref

    torch.manual_seed(0)
    x = torch.randn(2, 64, 33, 47, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(128, 64, 3, 3, device="cuda").bfloat16() / 24, torch.randn(128, device="cuda").bfloat16()
    addend = torch.randn(2, 128, 17, 24, device="cuda", dtype=torch.bfloat16) if residual else None
    exact = [None if t is None else t.double() for t in (x, weight, bias, addend)]
    ours = fused_conv(x, weight, bias, addend, stride=2, padding=1, relu=relu)
    expected = fused_conv_ref(*exact, 2, 1, relu)
    theirs = fused_conv_ref(x, weight, bias, addend, 2, 1, relu)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    slack = torch.finfo(torch.bfloat16).eps * expected.abs().max()
    assert (ours - expected).abs().max() <= 2 * (theirs - expected).abs().max() + slack


@torch.no_grad()
def test_every_convolution_before_a_relu_has_a_bias(monkeypatch):
    """Without one, cuDNN has no fused call: the convolution, the residual and the ReLU would be three kernels."""
    from dfn_fast.network import fused_blocks

    calls = []

    def recorded(x, weight, bias, residual, **settings):
        calls.append((settings["relu"], bias is None))
        return fused_conv(x, weight, bias, residual, **settings)

    fused_conv = fused_blocks.fused_conv
    fused = FusedDFN(random_dfn().eval(), return_border=True)
    monkeypatch.setattr(fused_blocks, "fused_conv", recorded)
    stages = fused.stages(batch((40, 48))[0])
    fused.smooth_scores(stages), fused.border_scores(stages)
    assert calls.count((True, True)) == 0
    assert calls.count((True, False)) > 30


def pack_for(sides, packed, weight):
    """Convolves images of ``sides`` with one packed weight, each against the definition."""
    from dfn_kernels.convolution.fused_conv import fused_conv, fused_conv_ref

    for side in sides:
        x = torch.randn(1, 64, side, side + 1)
        ours = fused_conv(x, weight, padding=1, packed=packed)
        torch.testing.assert_close(ours, fused_conv_ref(x, weight, None, None, 1, 1, True), rtol=1e-4, atol=1e-5)


def test_sizes_of_one_layout_share_a_weight():
    from dfn_kernels.convolution.fused_conv import Packed

    weight, packed = torch.randn(64, 64, 3, 3) / 24, Packed()
    pack_for([*range(4, 24), *range(4, 24)], packed, weight)
    assert len(packed.layouts) == 20  # each size has the layout that oneDNN wants for it
    assert len(packed.onednn) < 5
    assert set(packed.layouts.values()) == packed.onednn.keys()


def test_layouts_take_few_bytes_and_the_last_used_stay(monkeypatch):
    from dfn_kernels.convolution import fused_conv as module

    monkeypatch.setattr(module, "_description", lambda own, shape: repr(shape[2]).encode())  # each size has its own
    weight, packed = torch.randn(64, 64, 3, 3) / 24, module.Packed()
    pack_for([4], packed, weight)
    most = module.MOST_BYTES * weight.nbytes // torch.ops.mkldnn._nbytes(packed.onednn[b"4"])
    assert 2 <= most <= module.MOST_BYTES
    pack_for([4, 6, 4, *range(8, 8 + most - 1), 4, 99], packed, weight)
    assert len(packed.onednn) == most
    assert {b"4", b"99"} <= packed.onednn.keys()
    assert b"6" not in packed.onednn
    monkeypatch.setattr(module, "MOST_SHAPES", 3)
    pack_for([6, 8], packed, weight)
    assert len(packed.layouts) == 3


def test_threads_share_a_packed_weight(monkeypatch):
    from dfn_kernels.convolution import fused_conv as module

    monkeypatch.setattr(module, "_description", lambda own, shape: repr(shape[2]).encode())
    monkeypatch.setattr(module, "MOST_SHAPES", 4)
    weight, packed, errors = torch.randn(64, 64, 3, 3) / 24, module.Packed(), []

    def work(seed):
        try:
            pack_for(
                torch.randint(4, 14, (60,), generator=torch.Generator().manual_seed(seed)).tolist(), packed, weight
            )
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("cpu", ["this one", "without bf16"])
def test_fused_conv_on_a_cpu(monkeypatch, cpu):
    """Compares each combination of bias, residual and ReLU with float64, in both precisions that oneDNN supports."""
    from dfn_kernels.convolution.fused_conv import Packed, fused_conv, fused_conv_ref

    if cpu != "this one":
        monkeypatch.setattr("dfn_kernels.convolution.fused_conv.onednn_takes_bf16", lambda: False)
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for has_bias, residual, relu in [(b, r, a) for b in (0, 1) for r in (0, 1) for a in (False, True)]:
            x, weight = torch.randn(2, 12, 9, 13).to(dtype), (torch.randn(20, 12, 3, 3) / 10).to(dtype)
            bias = torch.randn(20).to(dtype) if has_bias else None
            addend = torch.randn(2, 20, 5, 7).to(dtype) if residual else None
            exact = [None if t is None else t.double() for t in (x, weight, bias, addend)]
            ours = fused_conv(x, weight, bias, addend, stride=2, padding=1, relu=relu, packed=Packed())
            expected = fused_conv_ref(*exact, 2, 1, relu)
            theirs = fused_conv_ref(x, weight, bias, addend, 2, 1, relu)
            slack = torch.finfo(dtype).eps * expected.abs().max()
            assert ours.dtype == dtype
            assert F.relu(ours).equal(ours) or not relu
            if cpu != "this one":
                wide = [None if t is None else t.float() for t in (x, weight, bias, addend)]
                rounded = fused_conv(*wide, stride=2, padding=1, relu=relu, packed=Packed()).to(dtype)
                assert ours.equal(rounded)
            assert (ours - expected).abs().max() <= 2 * (theirs - expected).abs().max() + slack
