import pytest
import torch

from dfn_fast.data.loader import Batch
from dfn_fast.data.prefetch import on_device
from dfn_fast.errors import UserError

CPU = torch.device("cpu")


def batch(i, pinned=False):
    x = torch.full((2, 4, 4), i, dtype=torch.uint8)
    images = x[:, None].expand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    tensors = [t.pin_memory() if pinned else t for t in (images, x, x + 1)]
    return Batch(*tensors, [f"image {i}"])


def source(log, count=3, error_at=None):
    try:
        for i in range(count):
            if i == error_at:
                raise UserError(f"file {i}")
            log.append(i)
            yield batch(i)
    finally:
        log.append("closed")


def test_batches_keep_their_order_and_are_drawn_one_at_a_time():
    log = []
    for i, got in enumerate(on_device(source(log), CPU)):
        assert log == list(range(i + 1))
        assert got.names == [f"image {i}"]
        assert got.labels[0, 0, 0] == i
    assert log == [0, 1, 2, "closed"]


def test_an_error_arrives_in_its_place():
    log, seen = [], []
    with pytest.raises(UserError, match="file 2"):
        for got in on_device(source(log, error_at=2), CPU):
            seen.append(got.names[0])
    assert seen == ["image 0", "image 1"]


def test_closing_early_closes_the_source():
    log = []
    batches = on_device(source(log), CPU)
    next(batches)
    batches.close()
    assert log == [0, "closed"]


def test_a_list_is_a_source_too():
    assert [b.names[0] for b in on_device([batch(0), batch(1)], CPU)] == ["image 0", "image 1"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_cross_on_their_own_stream_while_the_device_is_busy():
    device = torch.device("cuda")
    busy = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    pinned = [batch(i, pinned=True) for i in range(8)]
    sums, before = [], torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for got in on_device(pinned, device):
            assert got.images.is_contiguous(memory_format=torch.channels_last)
            for _ in range(10):
                busy = (busy @ busy).tanh()
            sums.append(torch.stack([x.sum() for x in got[:3]]))
            del got  # its memory is free again while the kernels that read it have yet to run
    finally:
        torch.cuda.set_sync_debug_mode(before)
    expected = [[x.sum().item() for x in b[:3]] for b in pinned]
    assert torch.stack(sums).tolist() == expected
