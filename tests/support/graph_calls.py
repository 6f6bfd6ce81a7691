"""Calls of a cache of graphs: images, and the comparison with the function itself."""

import torch

PLENTY = 2**40  # bytes: no cache of a test is limited


def random_images(size, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).to(device)


def check(cache, run, *images):
    assert all(torch.equal(cache(x), run(x)) for x in images)
