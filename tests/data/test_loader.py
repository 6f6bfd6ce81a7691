"""The training loader: its samples depend only on the seed, and its workers leave signals to the main process."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import cv2
import numpy as np
import pytest
import torch

import dfn_fast.data.loader as loader_module
from dfn_fast.data.base import Sample, SegmentationDataset
from dfn_fast.data.datasets.camvid import CamVidDataset
from dfn_fast.data.loader import TrainLoader
from dfn_fast.data.transforms import TrainTransform
from dfn_fast.errors import ConfigError, DataError


class Numbers(SegmentationDataset):
    """Small noisy images, the number in each pixel's last channel; ``broken`` ones are errors."""

    name = "numbers"
    classes = ("a", "b", "c")

    def __init__(self, length=11, broken=()):
        self.length, self.broken, self.split = length, broken, "train"

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.broken:
            raise DataError(f"images/{index}.png: this image is damaged; copy or download it again")
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (40, 44, 3), dtype=np.uint8)
        image[..., 2] = index
        return Sample(image, rng.integers(0, 3, (40, 44), dtype=np.uint8), f"{index}.png")


TRANSFORM = TrainTransform((32, 36), (1.0, 1.5), True, 3)


def loader(dataset=None, batch_size=2, seed=7, workers=0, **settings):
    return TrainLoader(dataset or Numbers(), TRANSFORM, batch_size=batch_size, seed=seed, workers=workers, **settings)


def equal(left, right):
    return left.names == right.names and all(torch.equal(a, b) for a, b in zip(left[:3], right[:3], strict=True))


def assert_same(left, right):
    assert len(left) == len(right) > 0
    assert all(equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_batch_is_what_the_network_takes(workers):
    (batch, *_) = list(loader(batch_size=3, workers=workers).epoch(0))
    assert batch.images.shape == (3, 3, 32, 36)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.shape == batch.borders.shape == (3, 32, 36)
    assert {t.dtype for t in batch[:3]} == {torch.uint8}
    # Channels are where they belong: the last one holds the number that the name has.
    assert [int(image[2, 16, 18]) for image in batch.images] == [int(name[:-4]) for name in batch.names]


def test_samples_are_transformed_with_a_generator_of_their_own():
    dataset = Numbers()
    batch = next(loader(dataset, seed=5).epoch(4))
    for i, name in enumerate(batch.names):
        index = int(name[:-4])
        rng = np.random.default_rng(np.random.SeedSequence(5, spawn_key=(4, index)))
        image, label, border = TRANSFORM(*dataset[index][:2], rng)
        np.testing.assert_array_equal(batch.images[i].permute(1, 2, 0), image)
        np.testing.assert_array_equal(batch.labels[i], label)
        np.testing.assert_array_equal(batch.borders[i], border)


def test_an_epoch_has_each_sample_once_and_drops_others_each_time():
    loading = loader(batch_size=3)
    assert len(loading) == 3
    dropped = []
    for epoch in range(6):
        batches = list(loading.epoch(epoch))
        assert len(batches) == 3
        names = [name for batch in batches for name in batch.names]
        assert len(set(names)) == 9
        dropped.append({f"{i}.png" for i in range(11)} - set(names))
    assert len(set().union(*dropped)) > 4
    full = loader(batch_size=11).epoch(0)
    assert len(set(next(full).names)) == 11


def test_workers_do_not_change_what_is_drawn():
    alone, helped = loader(), loader(workers=2)
    for epoch in (0, 1, 0):
        assert_same(list(alone.epoch(epoch)), list(helped.epoch(epoch)))


@pytest.mark.parametrize("error", [MemoryError, cv2.error("Failed to allocate 9 bytes")])
def test_a_sample_that_takes_too_much_memory_is_named(error):
    def fail():
        raise error

    with pytest.raises(DataError, match=r"sample 'images/4\.png' of split 'train': this sample cannot be scaled"):
        list(loader(Fatal(4, fail)).epoch(0))


@pytest.mark.parametrize("processes", [1, 2])
def test_shared_memory_that_is_too_small_for_the_batches_is_named(monkeypatch, processes):
    each = 2 * 32 * 36 * 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(loader_module, "shared_memory_bytes", lambda: 6 * each * processes)
    loader(workers=2)
    monkeypatch.setattr(loader_module, "shared_memory_bytes", lambda: 6 * each * processes - 1)
    loader(workers=0)
    with pytest.raises(ConfigError, match=r"--workers 2 needs up to 0\.\d MB in /dev/shm, .* but 0\.\d MB are"):
        loader(workers=2)
    loader(workers=2, share=slice(0, 1))


def test_spawned_workers_draw_the_same():
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert_same(list(loader(workers=1).epoch(2)), list(loader().epoch(2)))
    finally:
        multiprocessing.set_start_method(method, force=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_start_gives_the_rest_of_the_epoch(workers):
    whole = list(loader().epoch(3))
    loading = loader(workers=workers)
    for start in (1, 4):
        assert_same(list(loading.epoch(3, start)), whole[start:])
    assert not list(loading.epoch(3, len(loading)))


def test_an_epoch_left_early_does_not_leak_into_the_next():
    expected = list(loader().epoch(1))
    loading = loader(workers=2)
    for _ in range(3):
        batches = loading.epoch(0)
        next(batches)
    assert_same(list(loading.epoch(1)), expected)


def test_epochs_and_seeds_differ():
    def draw(seed, epoch):
        return {
            name: image for b in loader(seed=seed).epoch(epoch) for name, image in zip(b.names, b.images, strict=True)
        }

    first, epoch, seed = draw(7, 0), draw(7, 1), draw(8, 0)
    for other in (epoch, seed):
        assert list(first) != list(other)
        both = set(first) & set(other)
        assert sum(torch.equal(first[name], other[name]) for name in both) <= 1


def test_the_global_random_states_are_left_alone():
    for workers in (0, 1):
        loading = loader(workers=workers)
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
        list(loading.epoch(0))
        assert torch.equal(torch.get_rng_state(), state)
        np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


def test_the_watch_leaves_no_thread_behind():
    """One that still ran would hold the loader, and be the last to."""
    for _ in loader(workers=1).epoch(0):
        assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_named_without_a_workers_traceback(workers):
    others = multiprocessing.active_children()
    loading = loader(Numbers(broken=(4,)), workers=workers)
    for _ in range(2):  # the loader outlives the error
        with pytest.raises(DataError, match=r"^images/4\.png: this image is damaged; copy or download it again$"):
            list(loading.epoch(0))
    own = [child for child in multiprocessing.active_children() if child not in others]
    assert len(own) == workers
    del loading
    for worker in own:  # nothing holds the loader, so its workers have been told to end
        worker.join(30)
        assert not worker.is_alive()


def test_a_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(
        ConfigError, match=r"batch size 12 .* 11 images of split 'train' of data set 'numbers'.*at most"
    ):
        loader(batch_size=12)
    assert len(loader(batch_size=11)) == 1


@pytest.mark.parametrize(("option", "text"), [({"batch_size": 0}, "batch size"), ({"seed": -1}, "seed")])
def test_wrong_options_are_refused(option, text):
    with pytest.raises(ConfigError, match=text):
        loader(**option)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="other systems' workers end on SIGTERM")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_that_are_still_starting_leave_signals_too(number, monkeypatch):
    """They are sent one before their first line, and the main process gets none of it."""
    start = loader_module.start_worker

    def late_start(worker, progress):
        os.kill(os.getpid(), number)
        start(worker, progress)

    monkeypatch.setattr(loader_module, "start_worker", late_start)
    assert_same(list(loader(workers=2, timeout=20).epoch(0)), list(loader().epoch(0)))


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="other systems' workers end on SIGTERM")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_signals_to_the_main_process(number):
    others = multiprocessing.active_children()
    expected = list(loader().epoch(0))
    loading = loader(workers=2)
    batches = loading.epoch(0)
    drawn = [next(batches)]
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(workers) == 2
    # From another process, as a terminal or a scheduler sends it.
    subprocess.run(["kill", f"-{number.value}", *(str(worker.pid) for worker in workers)], check=True)
    drawn += list(batches)
    assert_same(drawn, expected)
    assert all(worker.is_alive() for worker in workers)


def test_workers_end_with_the_main_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import multiprocessing
            from test_loader import loader
            batches = loader(workers=2).epoch(0)
            next(batches)
            print(*(child.pid for child in multiprocessing.active_children()))
        """)
    )
    path = os.pathsep.join([os.path.dirname(__file__), os.getcwd()])
    command = [sys.executable, script]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert len(done.stdout.split()) == 2
    for worker in done.stdout.split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(worker), 0)


class Fatal(Numbers):
    """One sample ends the process that reads it, or never comes."""

    def __init__(self, fatal, how):
        super().__init__()
        self.fatal, self.how = fatal, how

    def names(self):
        return [f"images/{index}.png" for index in range(self.length)]

    def __getitem__(self, index):
        if index == self.fatal:
            self.how()
        return super().__getitem__(index)


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    while True:
        time.sleep(3600)


def hang_in_one_call():
    """As in a library that keeps Python's lock: no thread of the worker answers a signal but SIGKILL."""
    re.fullmatch(r"(a|a)*b", "a" * 60)


def own_children(others):
    """The processes that are left, after up to ten seconds for those that are just ending."""
    deadline = time.monotonic() + 10
    while left := [child for child in multiprocessing.active_children() if child not in others]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return left


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed by POSIX signals")
class TestWatch:
    """A worker that dies or hangs is reported with its sample, in time, and none stays behind."""

    @pytest.mark.parametrize("how", [be_killed, lambda: os._exit(3)], ids=["killed", "left"])
    def test_a_worker_that_dies_is_reported_with_its_sample(self, how):
        others = multiprocessing.active_children()
        dataset = Fatal(4, how)
        loading = loader(dataset, workers=2)
        with pytest.raises(
            DataError, match=r"a loading process has died(.|\n)*sample 'images/4\.png' of split 'train'"
        ):
            list(loading.epoch(0))
        assert not own_children(others)
        dataset.how = lambda: None  # the loader outlives the error: its next epoch has new workers
        assert_same(list(loading.epoch(0)), list(loader().epoch(0)))

    @pytest.mark.parametrize("how", [hang, hang_in_one_call])
    def test_a_worker_that_hangs_is_reported_with_its_sample_in_time(self, how):
        others = multiprocessing.active_children()
        loading = loader(Fatal(4, how), workers=2, timeout=3)
        start = time.monotonic()
        with pytest.raises(DataError) as caught:
            list(loading.epoch(0))
        assert time.monotonic() - start < 60
        assert "no batch came from the loading processes for 3 s (--loader-timeout)" in str(caught.value)
        assert re.search(r"sample 'images/4\.png' of split 'train', for \d+ s", str(caught.value))
        assert str(caught.value).count("sample '") == 1  # the other worker waits for work
        assert not own_children(others)

    @pytest.mark.parametrize(
        ("how", "text"),
        [(be_killed, "has died"), (hang, "no batch came"), (hang_in_one_call, "no batch came")],
        ids=["killed", "hang", "hang in one call"],
    )
    def test_batches_that_it_has_sent_do_not_keep_it_from_being_noticed(self, how, text):
        """Their memory is handed over by the worker itself, when they are received: this could fail, or wait."""
        others = multiprocessing.active_children()
        third = [batch.names[0] for batch in loader(batch_size=1).epoch(0)][2]
        loading = loader(Fatal(int(third[:-4]), how), batch_size=1, workers=1, timeout=3)
        with pytest.raises(DataError, match=rf"{text}(.|\n)*sample 'images/{third}'"), loading.watched():
            for _ in loading.epoch(0):
                time.sleep(1)
        assert not own_children(others)

    def test_a_death_between_two_batches_is_reported_where_the_loop_is(self):
        others = multiprocessing.active_children()
        loading = loader(workers=1)
        with pytest.raises(DataError, match="a loading process has died"), loading.watched():
            batches = loading.epoch(0)
            next(batches)
            (worker,) = own_children(others)
            threading.Timer(0.5, os.kill, (worker.pid, signal.SIGKILL)).start()
            for _ in range(600):
                time.sleep(0.1)
        assert not own_children(others)

    def test_files_are_named_where_there_are_some(self, write, write_pair):
        for name in "ab":
            write_pair(f"train/{name}.png", f"trainannot/{name}.png")
        root = write("train/c.txt", "").parents[1]
        dataset = KilledBy(root / "train" / "b.png", CamVidDataset(root, "train"))
        with pytest.raises(DataError, match=r"train/b\.png with .*trainannot/b\.png, for 0 s"):
            list(TrainLoader(dataset, TRANSFORM, batch_size=1, seed=0, workers=1).epoch(0))

    def test_other_errors_of_a_worker_stay_what_they_are(self):
        def fail():
            raise RuntimeError("of the data set's own")

        with pytest.raises(RuntimeError, match="of the data set's own"):
            list(loader(Fatal(4, fail), workers=1).epoch(0))

    def test_the_main_process_that_hangs_is_reported_with_its_sample_in_time(self):
        released = threading.Event()
        loading = loader(Fatal(4, lambda: released.wait(60)), timeout=0.2)
        with pytest.raises(DataError) as caught:
            list(loading.epoch(0))
        released.set()
        assert "no batch came from the main process for 0.2 s (--loader-timeout)" in str(caught.value)
        assert re.search(r"sample 'images/4\.png' of split 'train', for 0 s", str(caught.value))

    def test_no_limit(self):
        assert_same(list(loader(timeout=0).epoch(0)), list(loader().epoch(0)))
        assert_same(list(loader(workers=1, timeout=0).epoch(0)), list(loader().epoch(0)))


class KilledBy(SegmentationDataset):
    """``dataset``, one of whose images ends the process that reads it."""

    def __init__(self, path, dataset):
        super().__init__(dataset.pairs, dataset.split, dataset.where)
        self.path, self.dataset = path, dataset

    def __getitem__(self, index):
        if self.pairs[index].image == self.path:
            be_killed()
        return self.dataset[index]
