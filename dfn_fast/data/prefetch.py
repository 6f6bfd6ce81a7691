"""Batches on the device that trains, the next one crossing to it while the current step still runs.

Border targets come with the batch: the loader's processes draw them, where Canny is at home.
"""

from collections.abc import Generator, Iterable

import torch

from dfn_fast.data.loader import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """``batches``, on ``device``; an error in one arrives in its place, after all before it.

    On CUDA a batch in pinned memory crosses on a stream of its own. It is asked for when the step before it has been
    launched, not finished, so that both go on at once for as long as nobody waits for the device. Elsewhere a batch
    is passed through. Closing this closes ``batches``.
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
    """``batch`` copied to the device on ``stream``; the current stream's next work waits for it, the host does not."""
    with torch.cuda.stream(stream):
        images, labels, borders = (x.to(device, non_blocking=True) for x in batch[:3])
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    for x in (images, labels, borders):
        x.record_stream(current)  # its memory, of another stream, is not used again before the step is through with it
    return Batch(images, labels, borders, batch.names)
