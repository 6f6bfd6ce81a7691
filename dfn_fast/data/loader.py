"""Training batches: an order and an augmentation that follow from the seed alone, whatever the number of workers."""

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dfn_fast.data.base import SegmentationDataset
from dfn_fast.data.transforms import TrainTransform
from dfn_fast.errors import ConfigError, UserError


class Batch(NamedTuple):
    """What one forward pass of training takes."""

    images: Tensor  # [B, 3, H, W] RGB uint8, channels_last
    labels: Tensor  # [B, H, W] uint8, 255 = ignore
    borders: Tensor  # [B, H, W] uint8 in {0, 1, 255}
    names: list[str]


class TrainLoader:
    """Batches of augmented samples, shuffled anew for each epoch.

    Epoch ``e`` has ``len(dataset) // batch_size`` batches; the samples left over differ from epoch to epoch. Its
    order follows from ``(seed, e)``, a sample's augmentation from ``(seed, e, index)``. The processes that load live
    from the first epoch to the end; 0 ``workers``: the main process loads. One epoch is drawn at a time.

    Raises:
        ConfigError: the data set has less than a batch, or the seed is negative.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        transform: TrainTransform,
        *,
        batch_size: int,
        seed: int,
        workers: int,
        pin_memory: bool = False,
    ):
        if batch_size < 1:
            raise ConfigError(f"batch size: expected 1 or more, got {batch_size}")
        if batch_size > len(dataset):
            raise ConfigError(
                f"batch size {batch_size} is more than the {len(dataset)} images of split {dataset.split!r} of "
                f"data set {dataset.name!r}: no batch would be full; lower it to at most {len(dataset)} or add images"
            )
        if seed < 0:
            raise ConfigError(f"seed: expected 0 or more, got {seed}")
        self.size, self.batch_size, self.seed = len(dataset), batch_size, seed
        self._keys: list[list[SampleKey]] = []  # of the epoch being drawn; the DataLoader reads it at each start
        self._loader = DataLoader(
            AugmentedSamples(dataset, transform, seed),
            batch_sampler=self._keys,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            worker_init_fn=start_worker,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # each start draws a number, which must not come out of torch's global state
        )

    def __len__(self) -> int:
        """Batches in an epoch; the last partial one is dropped."""
        return self.size // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on.

        An error in a data set's file arrives here as itself, from whichever process met it.
        """
        order = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(epoch,))).permutation(self.size)
        batches = order[: len(self) * self.batch_size].reshape(len(self), self.batch_size)[start:]
        self._keys[:] = [[SampleKey(epoch, index) for index in batch] for batch in batches.tolist()]
        for batch in self._loader:
            if isinstance(batch, UserError):
                try:
                    raise batch
                finally:
                    del batch  # it would hold this frame, and the frame it: the workers would outlive their loader
            yield batch


class SampleKey(NamedTuple):
    """Names one augmented sample; travels to the process that makes it."""

    epoch: int
    number: int  # in the data set


@dataclass
class AugmentedSamples(Dataset):
    """``samples[key]``: image, label, border target and name, or the error that kept them from being made.

    An error is returned, since torch would wrap one that is raised in a worker's traceback.
    """

    dataset: SegmentationDataset
    transform: TrainTransform
    seed: int

    def __getitem__(self, key: SampleKey) -> tuple[np.ndarray, np.ndarray, np.ndarray, str] | UserError:
        try:
            image, label, name = self.dataset[key.number]
            rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))
            return *self.transform(image, label, rng), name
        except UserError as error:
            return error


def collate(samples: list) -> Batch | UserError:
    """The samples as one batch, or the first error among them."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    images, labels, borders, names = zip(*samples, strict=True)
    stacked = [torch.from_numpy(np.stack(arrays)) for arrays in (images, labels, borders)]
    return Batch(stacked[0].permute(0, 3, 1, 2), stacked[1], stacked[2], list(names))


def start_worker(worker: int) -> None:
    """One thread for OpenCV (torch's loader sees to torch's), and signals are left to the main process.

    Ctrl-C and a cluster's SIGTERM reach every process of the run. The main one saves and then ends its workers; one
    that went by itself would break the saving.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey_parent, args=(os.getppid(),), daemon=True).start()


def obey_parent(parent: int) -> None:
    """Waits for SIGTERM and exits where it comes from ``parent``."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
