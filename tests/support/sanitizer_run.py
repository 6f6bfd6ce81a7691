"""A program for compute-sanitizer: runs every operator forward and backward at small odd sizes and checks it.

Prints a line for each operator and dtype. The exit status is 1 if a result is wrong.
"""

import sys

import torch
from torch import Tensor

from support.every_operator import Problem, Sizes, convolutions, problems, results

# Channels in narrow and wide accesses; no side is a multiple of a tile; scale factors that are not integers, and 1.
ODD = [Sizes(2, 5, 7, 9, 3, 4), Sizes(1, 24, 5, 3, 5, 3)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def error(ours: Tensor, truth: Tensor) -> float:
    """The largest difference relative to the largest value."""
    return ((ours.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1)).item()


def exact(problem: Problem) -> Problem:
    return problem._replace(inputs=tuple(x.double() if x.is_floating_point() else x for x in problem.inputs))


def main(device: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> int:
    """Returns the number of wrong results."""
    wrong = 0
    for sizes in ODD:
        for dtype in dtypes:
            for name, problem in (problems(sizes, dtype, device) | convolutions(sizes, dtype, device)).items():
                truth = results(problem.definition, exact(problem))
                pairs = zip(results(problem.operator, problem), truth, strict=True)
                worst = max(error(ours, true) for ours, true in pairs if ours.is_floating_point())
                # A wrong address gives an error as large as the values. Rounding errors are far smaller.
                failed = not worst < 64 * torch.finfo(dtype).eps
                wrong += failed
                print(f"{'WRONG' if failed else 'right'} {name} {list(sizes)} {dtype}: {worst:.1e}", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return wrong


if __name__ == "__main__":
    sys.exit(main("cuda") > 0)
