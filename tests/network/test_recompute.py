import pytest
import torch

from dfn_fast.network.recompute import set_recompute
from support.allocations import Allocations
from support.networks import narrow_backbones
from support.steps import tiny_batch, tiny_trainer


def one_pass(mode, device="cpu", compiled=None, **settings):
    with narrow_backbones():
        trainer = tiny_trainer(device, blocks=2, **settings)
    set_recompute(trainer.model, mode)
    loss_fn = trainer.loss if compiled is None else compiled(trainer.loss)
    trainer.model.train()
    images, labels, borders, _ = tiny_batch()
    with trainer.autocast():
        loss = loss_fn(*(x.to(device) for x in (images, labels, borders)))
    loss.backward()
    model = trainer.model
    grads = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    buffers = {f"buffer {n}": b for n, b in model.named_buffers()}
    return {"loss": loss.detach(), **grads, **buffers}


@pytest.fixture(scope="module")
def kept():
    return one_pass("off")


@pytest.mark.parametrize("mode", ["norm", "blocks"])
def test_what_is_computed_again_has_the_same_bits(mode, kept):
    """Compares losses, gradients and running statistics, which must be updated only once."""
    again = one_pass(mode)
    assert again.keys() == kept.keys()
    assert [name for name in kept if not torch.equal(kept[name], again[name])] == []
    assert kept["buffer backbone.bn1.num_batches_tracked"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["norm", "blocks"])
def test_it_is_one_graph_when_compiled(mode):
    parts = {"border": False, "deep_supervision": False}
    kept = one_pass("off", parts=parts)
    again = one_pass(mode, compiled=lambda loss: torch.compile(loss, fullgraph=True, backend="aot_eager"), parts=parts)
    assert again.keys() == kept.keys()
    assert [name for name in kept if not torch.equal(kept[name], again[name])] == []


def kept_bytes(mode):
    """Peak memory of the forward pass, which ends with everything that is kept for the backward pass."""
    trainer, batch = tiny_trainer(blocks=4), tiny_batch((96, 96))
    set_recompute(trainer.model, mode)
    trainer.model.train()
    return Allocations(lambda: trainer.loss(*batch[:3])).peak


def test_fewer_activations_are_kept():
    off, norm, blocks = (kept_bytes(mode) for mode in ("off", "norm", "blocks"))
    assert norm < 0.75 * off
    assert blocks < 0.4 * off


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["norm", "blocks"])
def test_it_is_the_same_on_a_gpu_under_autocast(mode):
    off, again = (one_pass(m, "cuda", amp="bf16") for m in ("off", mode))
    for name, value in off.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6, msg=name)
