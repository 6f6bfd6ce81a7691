"""CUDA graphs on the CPU that overwrite memory as aggressively as a device may."""

import threading
import weakref

import torch

from dfn_fast.runtime.cuda_graph import WARM_UP


def fill(references, value):
    """Overwrites the tensors that still exist."""
    for reference in references:
        tensor = reference()
        if tensor is not None:
            with torch.inference_mode():
                tensor.fill_(value)


class StandIn:
    """Graphs on the CPU that overwrite memory as aggressively as a device may.

    A replay writes to its own output and overwrites those of all other graphs, whose memory it shares. Until ``wait``,
    earlier work still writes to the inputs. After ``record``, later work may write to the outputs. A capture needs
    ``size(output)`` bytes. It reuses the pool's memory, or with ``fragmented`` adds to it.
    """

    device = torch.device("cpu")

    def __init__(self, size=lambda output: 0, fragmented=False, error=None):
        self.size, self.fragmented, self.error = size, fragmented, error
        self.calls, self.pools, self.reserved = [], 0, 0
        self.inputs, self.outputs = [], []  # weak references
        self.busy = threading.Lock()

    def new_pool(self):
        assert all(output() is None for output in self.outputs), "the old pool is still in use"
        self.pools += 1
        self.reserved = 0

    def pool_bytes(self):
        return self.reserved

    def free_bytes(self):
        return 1 << 33

    def warm_up(self, run):
        self.calls.append("warm_up")
        for _ in range(WARM_UP):
            run()

    def capture(self, run):
        self.calls.append("capture")
        if self.error is not None:
            error = self.error(run)
            if error is not None:
                raise error
        output = run().clone()
        need = self.size(output)
        self.reserved = self.reserved + need if self.fragmented else max(self.reserved, need)
        values = [cell.cell_contents for cell in run.__closure__]
        self.inputs += [weakref.ref(value) for value in values if isinstance(value, torch.Tensor)]
        self.outputs.append(weakref.ref(output))

        def replay():
            self.calls.append("replay")
            fill(self.outputs, 251)
            with torch.inference_mode():
                output.copy_(run())

        return replay, output

    def wait(self):
        assert self.busy.acquire(blocking=False), "two replays at once"
        self.calls.append("wait")
        fill(self.inputs, 252)

    def record(self):
        self.calls.append("record")
        fill(self.outputs, 253)
        self.busy.release()

    def finish(self):
        self.calls.append("finish")

    def held(self):
        """The bytes of the inputs that still exist. Both captures of a graph share one input."""
        alive = (reference() for reference in self.inputs)
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in alive if tensor is not None}.values())
