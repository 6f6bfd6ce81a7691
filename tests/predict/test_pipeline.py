"""The pipeline with stages that count, block and fail: bounds, overlap, order and shutdown."""

import threading
import weakref
from collections import Counter
from itertools import count

import pytest

from dfn_fast.errors import UserError
from dfn_fast.predict.pipeline import NoMoreImages, Pipeline

SECONDS = 20  # after which a stage that should have been reached fails its test


class Image:
    def __init__(self, job, shape=(4, 4)):
        self.job, self.shape = job, shape


class Stages:
    """Stages that note what they do; ``images`` are those alive now."""

    def __init__(self, shapes=None):
        self.shapes = shapes or {}
        self.lock = threading.Lock()
        self.alive, self.most_alive = 0, 0
        self.batches, self.written, self.reports = [], [], []
        self.run_threads = set()

    def read(self, job):
        image = Image(job, self.shapes.get(job, (4, 4)))
        with self.lock:
            self.alive += 1
            self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(image, self.forget)
        return image

    def forget(self):
        with self.lock:
            self.alive -= 1

    def run(self, images):
        assert len({image.shape for image in images}) == 1
        self.batches.append([image.job for image in images])
        self.run_threads.add(threading.current_thread())
        return [(image, 10 * image.job) for image in images]

    def write(self, job, result):
        image, value = result
        assert image.job == job
        assert value == 10 * job
        self.written.append(job)

    def report(self, job, error):
        self.reports.append((job, error and str(error)))

    def pipeline(self, **settings):
        return Pipeline(self.read, self.run, self.write, self.report, size=lambda image: image.shape, **settings)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("jobs", [0, 1, 13])
def test_every_job_is_read_run_and_written_once_in_order(jobs, batch_size):
    stages = Stages()
    stages.pipeline(batch_size=batch_size, readers=3, writers=1)(range(jobs))
    assert [job for batch in stages.batches for job in batch] == list(range(jobs))
    assert stages.written == list(range(jobs))
    assert stages.reports == [(job, None) for job in range(jobs)]
    assert max(map(len, stages.batches), default=batch_size) == min(batch_size, jobs or batch_size)
    assert stages.run_threads <= {threading.current_thread()}
    assert stages.alive == 0


def test_equal_sizes_share_a_batch_and_the_rest_keeps_its_order():
    shapes = {job: (4, 4) if job % 2 else (8, 4) for job in range(8)}
    stages = Stages(shapes | {8: (1, 1)})
    stages.pipeline(batch_size=4)(range(9))
    assert stages.batches == [[0, 2, 4, 6], [1, 3, 5, 7], [8]]


@pytest.mark.parametrize("sizes", ["equal", "two", "all differ"])
@pytest.mark.parametrize("slow", ["read", "run", "write"])
def test_images_in_memory_are_bounded(sizes, slow):
    number = {"equal": 1, "two": 2, "all differ": 100}[sizes]
    stages = Stages({job: (job % number, 4) for job in range(100)})
    pipeline = stages.pipeline(batch_size=4, readers=2, writers=2)
    pause = threading.Event()

    def slowly(stage):
        def slowed(*arguments):
            pause.wait(0.002)  # never set: gives the other stages the time to run away
            return stage(*arguments)

        return slowed

    setattr(pipeline, slow, slowly(getattr(stages, slow)))
    pipeline(range(100))
    assert sorted(stages.written) == list(range(100))
    assert stages.most_alive <= pipeline.capacity == 20


def test_as_many_images_as_allowed_are_read_ahead_and_no_more():
    stages = Stages()
    begun, enough = [], threading.Event()
    pipeline = stages.pipeline(batch_size=2, readers=2)

    def read(job):
        begun.append(job)
        if len(begun) == pipeline.ahead + 2:
            enough.set()
        return stages.read(job)

    def run(images):
        assert enough.wait(SECONDS)
        if len(stages.batches) == 0:
            assert len(begun) == pipeline.ahead + 2  # those of this batch, and those ahead
        return stages.run(images)

    pipeline.read, pipeline.run = read, run
    pipeline(range(50))
    assert len(stages.written) == 50


def test_next_images_are_read_while_a_batch_runs():
    stages = Stages()
    read = {job: threading.Event() for job in range(6)}
    pipeline = stages.pipeline()
    pipeline.read = lambda job: (read[job].set(), stages.read(job))[1]

    def run(images):
        following = images[0].job + 2
        assert following not in read or read[following].wait(SECONDS)
        return stages.run(images)

    pipeline.run = run
    pipeline(range(6))
    assert sorted(stages.written) == list(range(6))  # several threads write


def test_the_next_batch_runs_while_results_are_written():
    stages = Stages()
    ran = {job: threading.Event() for job in range(6)}
    pipeline = stages.pipeline()

    def run(images):
        ran[images[0].job].set()
        return stages.run(images)

    def write(job, result):
        assert job + 1 not in ran or ran[job + 1].wait(SECONDS)
        stages.write(job, result)

    pipeline.run, pipeline.write = run, write
    pipeline(range(6))
    assert sorted(stages.written) == list(range(6))


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("broken", ["read", "run", "write"])
def test_a_user_error_belongs_to_its_job(broken, batch_size):
    stages = Stages()
    pipeline = stages.pipeline(batch_size=batch_size, writers=1)
    stage = getattr(stages, broken)

    def fail(first, *rest):
        jobs = [image.job for image in first] if broken == "run" else [first]
        if {2, 5} & set(jobs):
            raise UserError(f"{broken} of {jobs}")
        return stage(first, *rest)

    setattr(pipeline, broken, fail)
    pipeline(range(9))
    named = [[job] for job in (2, 5)]
    assert [text for _, text in sorted(stages.reports) if text] == [f"{broken} of {job}" for job in named]
    assert [job for job, text in sorted(stages.reports) if text] == [2, 5]
    assert stages.written == [0, 1, 3, 4, 6, 7, 8]
    assert Counter(job for job, _ in stages.reports) == Counter(range(9))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_source_that_ends_ends_the_jobs(batch_size):
    stages = Stages()
    pipeline = stages.pipeline(batch_size=batch_size, readers=1, writers=1)

    def read(job):
        if job >= 7:
            raise NoMoreImages
        return stages.read(job)

    pipeline.read = read
    pipeline(count())
    assert stages.written == list(range(7))
    assert stages.reports == [(job, None) for job in range(7)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("stage", ["read", "run", "write", "report"])
def test_another_error_ends_the_run_and_what_has_run_is_written(stage, error):
    stages = Stages()
    pipeline = stages.pipeline(writers=1)
    plain = getattr(stages, stage)

    def fail(first, *rest):
        job = first[0].job if stage == "run" else first
        if job == 5:
            raise error("stop")
        return plain(first, *rest)

    setattr(pipeline, stage, fail)
    with pytest.raises(error, match="stop"):
        pipeline(count())
    ran = [batch[0] for batch in stages.batches]
    assert ran == list(range(len(ran)))
    assert stages.written == [job for job in ran if stage != "write" or job != 5]
    assert len(ran) <= 5 + pipeline.capacity


def test_a_result_being_written_at_an_interruption_is_finished():
    stages = Stages()
    pipeline = stages.pipeline()
    begun, interrupted = threading.Event(), threading.Event()

    def write(job, result):
        begun.set()
        assert interrupted.wait(SECONDS)
        stages.write(job, result)

    def run(images):
        if images[0].job == 1:
            assert begun.wait(SECONDS)
            interrupted.set()
            raise KeyboardInterrupt
        return stages.run(images)

    pipeline.write, pipeline.run = write, run
    with pytest.raises(KeyboardInterrupt):
        pipeline(count())
    assert stages.written == [0]


def test_a_full_disk_ends_the_run_and_nothing_more_is_written():
    stages = Stages()
    pipeline = stages.pipeline(batch_size=8, writers=1)
    tried, never = [], threading.Event()

    def write(job, result):
        tried.append(job)
        if job == 0:
            raise OSError(28, "No space left on device")
        never.wait(1)  # more than enough for the caller's thread to see the error

    pipeline.write = write
    with pytest.raises(OSError, match="No space left"):
        pipeline(count())
    assert tried in ([0], [0, 1])


@pytest.mark.parametrize("slow", ["read", "run", "write"])
def test_bytes_in_memory_are_bounded(slow):
    stages, weights = Stages(), {job: 10 * (job % 7) for job in range(60)} | {30: 500}
    held, most = set(), []

    def read(job):
        with stages.lock:
            held.add(job)
            most.append((sum(weights[other] for other in held), len(held)))
        return stages.read(job)

    def write(job, result):
        stages.write(job, result)
        with stages.lock:
            held.discard(job)

    pipeline = stages.pipeline(batch_size=4, writers=2, weigh=weights.__getitem__, most_bytes=100)
    pipeline.read, pipeline.write = read, write
    plain, pause = getattr(pipeline, slow), threading.Event()
    setattr(pipeline, slow, lambda *arguments: (pause.wait(0.001), plain(*arguments))[1])
    pipeline(range(60))
    assert sorted(stages.written) == list(range(60))
    assert [held for held in most if held[0] > 100] == [(500, 1)]  # alone
    assert max(together for _, together in most) > 1


def test_a_job_that_cannot_be_weighed_fails_alone_and_a_video_may_end_where_there_is_no_room():
    stages = Stages()

    def weigh(job):
        if job == 1:
            raise UserError("heavy")
        return 60

    def read(job):
        if job == 4:
            raise NoMoreImages
        if job == 2:
            raise UserError("damaged")  # and its bytes are free
        return stages.read(job)

    pipeline = stages.pipeline(batch_size=2, writers=1, weigh=weigh, most_bytes=100)
    pipeline.read = read
    pipeline(count())
    assert stages.written == [0, 3]
    assert sorted(stages.reports) == [(0, None), (1, "heavy"), (2, "damaged"), (3, None)]
