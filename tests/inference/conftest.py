"""A small network and test pictures for the inference tests."""

import numpy as np
import pytest

from support.plain_predictions import random_model


@pytest.fixture(scope="module")
def model():
    return random_model().double()


@pytest.fixture(scope="module")
def picture():
    """``picture(height, width)`` is an image of blocks and noise."""

    def make(height, width):
        rng = np.random.default_rng(height * width)
        coarse = rng.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), np.uint8)
        image = np.kron(coarse, np.ones((9, 9, 1), np.uint8))[:height, :width].astype(int)
        return np.clip(image + rng.integers(-20, 20, image.shape), 0, 255).astype(np.uint8)

    return make
