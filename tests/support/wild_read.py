"""A script that fails: upsample_add reads far past the end of ``high``, and an innocent operator follows it."""

import torch
from torch import Tensor

from dfn_kernels import upsample_add
from dfn_kernels.attention import upsample_add_triton as kernels


class Shorter:
    """The parts of a tensor that a launcher reads. Its memory is far smaller than its shape."""

    def __init__(self, x: Tensor, shape: tuple[int, ...]):
        self.x, self.shape, self.dtype = x, torch.Size(shape), x.dtype

    def data_ptr(self) -> int:
        return self.x.data_ptr()


def main() -> None:
    forward = kernels.forward

    def misled(low: Tensor, high: Tensor) -> Tensor:
        return forward(low, Shorter(high, (1, 8, 16384, 16384)))  # type: ignore[arg-type]

    kernels.forward = misled
    low, high = torch.zeros(1, 8, 512, 512, device="cuda"), torch.zeros(1, 8, 2, 2, device="cuda")
    out = upsample_add(low, high)
    print((out + 1).sum().item())  # the error appears here, unless the operator waits


if __name__ == "__main__":
    main()
