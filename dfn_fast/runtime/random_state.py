"""Seeds, and the state of every random generator, from which a run continues bit for bit.

Equal bits need the same machine too: another number of threads adds up numbers in another order.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfn_fast.runtime.device import choose_algorithms


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seeds PyTorch, NumPy and Python; ``deterministic``: see :func:`choose_algorithms`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    choose_algorithms(deterministic)


def random_state() -> dict[str, Any]:
    """The state of every random generator in the process, as tensors and plain values that ``weights_only`` loads."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of :func:`random_state`; skips the CUDA generators if the number of devices has changed."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class WithoutRandomNumbers(TorchFunctionMode):
    """A context in which this thread leaves a tensor as it is where it would fill it with random numbers."""

    _FILLS = (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, Tensor.uniform_, Tensor.normal_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self._FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
