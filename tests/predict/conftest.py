"""Checkpoints to predict with, and an empty working directory for each test."""

import pytest
import torch

from support.saved_networks import save_checkpoint, small_network
from support.tiny_resnet import tiny_backbones


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Makes loading a checkpoint build a tiny backbone."""
    with tiny_backbones():
        yield


@pytest.fixture(scope="module")
def model():
    return small_network()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder as the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A training checkpoint of ``model``."""
    return save_checkpoint(model, tmp_path_factory.mktemp("checkpoint") / "best.pth")


@pytest.fixture
def checkpoint(saved, here):
    """That checkpoint as an argument, in an empty working directory."""
    return str(saved)


@pytest.fixture
def bare(here):
    """``bare(num_classes)`` writes bare weights and returns their path as an argument."""

    def write(num_classes, border=True):
        torch.save(small_network(num_classes, border).state_dict(), "bare.pth")
        return "bare.pth"

    return write
