"""Batches on the training device. The next one is copied there while the current step still runs.

Border targets come with the batch: the workers compute them, because Canny runs on the CPU.
"""

from collections.abc import Generator, Iterable

import torch

from dfn_fast.data.loader import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """``batches``, on ``device``; an error in one is raised in its place, after all before it.

    On CUDA a batch in pinned memory is copied on a side stream. It is requested when the step before it has been
    launched, not finished, so that both run at once as long as nobody waits for the device. Elsewhere a batch is
    passed through. Closing this closes ``batches``.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    source = iter(batches)
    try:
        for batch in source:
            yield batch if stream is None else cross(batch, device, stream)
    finally:
        if isinstance(source, Generator):
            source.close()


def cross(batch: Batch, device: torch.device, stream: torch.cuda.Stream) -> Batch:
    """Copies ``batch`` to the device on ``stream``. The current stream's later work waits for it, the host does not."""
    with torch.cuda.stream(stream):
        images, labels, borders = (x.to(device, non_blocking=True) for x in batch[:3])
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    for x in (images, labels, borders):
        x.record_stream(current)  # the other stream must not reuse this memory before the step is done with it
    return Batch(images, labels, borders, batch.names)
