"""Calls of a graph cache: images to call it with, and the comparison with the plain function."""

import torch

PLENTY = 2**40  # bytes: enough to leave a cache unlimited


def random_images(size, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).to(device)


def check(cache, run, *images):
    assert all(torch.equal(cache(x), run(x)) for x in images)
