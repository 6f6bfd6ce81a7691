"""The figures in benchmark rows: shares of the machine's limits, turns, energy."""

import dataclasses
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import figures, machine, measure
from benchmarks.harness.counting import Machine, Network, floor, total_bytes, total_flops
from benchmarks.harness.figures import Turns, Work
from benchmarks.harness.training_trial import Shape, TrainingTrial, cpu_shapes
from dfn_fast import ReferenceDFN
from dfn_fast.config import recipe


@pytest.fixture
def roofs(monkeypatch):
    """A machine that copies 10 GB/s and multiplies 1 TFLOP/s."""
    monkeypatch.setattr(machine, "copy_bandwidth", lambda: 1e10)
    monkeypatch.setattr(machine, "matrix_product", lambda dtype: 1e12)


def test_shares_of_the_roofs(roofs):
    work = Work(bytes=10**8, flops=10**9, dtype=torch.float32, images=4)  # 10 ms of copying, 1 ms of arithmetic
    found = figures.figures([0.02, 0.04, 0.03, 0.05, 0.01], work)
    assert (found["median_ms"], found["p20_ms"], found["p80_ms"]) == pytest.approx((30, 20, 50))
    assert (found["gb_per_s"], found["tflop_per_s"]) == pytest.approx((10 / 3, 1 / 30))
    assert (found["share_of_copy"], found["share_of_product"]) == pytest.approx((1 / 3, 1 / 30))
    assert (found["floor_ms"], found["share_of_floor"]) == pytest.approx((10, 1 / 3))
    assert found["images_per_s"] == pytest.approx(4 / 0.03)


def test_work_of_networks_has_its_own_counts_and_a_common_floor(roofs):
    written, least = (Network(height=64, width=64, backbone="resnet18", savings=saved) for saved in (False, True))
    work = Work.of_networks([written, written], [least, least], torch.bfloat16)
    assert (work.flops, work.bytes) == (2 * total_flops(written), 2 * total_bytes(written, 2))
    assert work.floor == 2 * floor(least, Machine(1e12, 1e10))
    assert work.flops > 2 * total_flops(least)
    trained = Work.of_networks([written], [least], torch.float32, training=True)
    assert (trained.flops, trained.bytes) == (total_flops(written, True), total_bytes(written, 4, True))


def test_a_trial_counts_the_parts_that_it_trains(roofs):
    shape = next(shape for shape in cpu_shapes() if not shape.config.border)
    config = dataclasses.replace(shape.config, crop=(32, 64))
    with torch.device("meta"):
        model = ReferenceDFN(shape.num_classes, **config.network_arguments()).train()
        data = torch.empty(config.batch_size, 3, *config.crop)
    with FlopCounterMode(display=False) as counter:
        sum(score.sum() for scores in model.scores(data) for score in scores).backward()
    trial = TrainingTrial(dataclasses.replace(shape, config=config), "off")
    assert trial.work("eager").flops == counter.get_total_flops()


def test_every_implementation_gets_its_row_from_the_same_turns(roofs, monkeypatch):
    times = {"eager": [0.2, 0.4, 0.6], "ours": [0.1, 0.1, 0.1]}
    monkeypatch.setattr(measure, "alternate", lambda calls, rounds: {name: times[name] for name in calls})
    turns, rows = Turns(), {"eager": {"kept": 1}, "ours": {}}
    for name, row in rows.items():
        turns.add(name, lambda: None, Work(10**6, 10**6, torch.float32, images=2), row)
    turns.time(0.1)
    assert rows["eager"]["kept"] == 1
    assert rows["eager"]["median_ms"] == pytest.approx(400)
    assert rows["ours"]["median_ms"] == pytest.approx(100)
    assert rows["ours"]["speed_up_over_eager"] == pytest.approx(4)
    assert "joules_per_image" not in rows["ours"]


class Counter:
    """NVIDIA's library for a GPU that draws 200 W, whose clock and counter move by a call."""

    NVML_CLOCK_SM = 1
    NVMLError = ZeroDivisionError

    def __init__(self, monkeypatch):
        self.seconds = self.calls = 0.0
        monkeypatch.setattr(machine, "_gpu", lambda: (self, "handle"))
        monkeypatch.setattr(machine, "time", types.SimpleNamespace(perf_counter=lambda: self.seconds))

    def call(self):
        self.seconds += 0.25
        self.calls += 1

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        return 200e3 * self.seconds

    def nvmlDeviceGetClockInfo(self, handle, which):  # noqa: N802
        return 1000 + self.calls


def test_energy_of_a_call(monkeypatch):
    counter = Counter(monkeypatch)
    assert machine.power(counter.call) == {"joules_per_call": 50.0, "watts": 200.0, "sm_clock_mhz": 1003.0}
    assert counter.calls == 4


def test_energy_of_an_image_stands_in_the_row(roofs, monkeypatch):
    counter, row = Counter(monkeypatch), {}
    monkeypatch.setattr(measure, "alternate", lambda calls, rounds: {name: [0.1] for name in calls})
    turns = Turns()
    turns.add("ours", counter.call, Work(1, 1, torch.float32, images=5), row)
    turns.time(0.1)
    assert row["joules_per_image"] == 10.0


def test_no_counter_no_energy(monkeypatch):
    counter = Counter(monkeypatch)
    monkeypatch.setattr(counter, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: 1 / 0, raising=False)
    assert machine.power(counter.call) == {}
    monkeypatch.setattr(machine, "_gpu", lambda: None)
    assert machine.power(counter.call) == {}


def test_ceilings_are_measured_once(monkeypatch):
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 24)
    monkeypatch.setattr(machine, "PRODUCT_SIDE", 256)
    found = machine.ceilings()
    assert set(found) >= {"copy_gb_per_s", "product_float32_tflop_per_s"}
    assert all(roof > 0 for roof in found.values())
    assert machine.ceilings() == found  # another measurement would differ in some digit


def test_what_does_not_fit_into_memory_is_skipped():
    from benchmarks import conftest

    def outcome(error):
        hook = conftest.pytest_pyfunc_call()
        next(hook)
        hook.throw(error)

    with pytest.raises(pytest.skip.Exception, match=r"needs more memory than this GPU has: Tried to allocate 9 GiB$"):
        outcome(torch.OutOfMemoryError("Tried to allocate 9 GiB\nand much advice"))
    with pytest.raises(AssertionError, match="wrong"):
        outcome(AssertionError("wrong"))


def test_a_step_is_held_against_the_first_that_fits_into_memory(monkeypatch):

    trial = TrainingTrial(Shape("a network", recipe("synthetic"), 8), "bf16")
    losses = {"float32": None, "eager": 2.0, "compile": 2.01, "ours": 2.5}
    ran = []

    def run(implementation):
        ran.append(implementation)
        if losses[implementation] is None:
            raise torch.OutOfMemoryError("too large")
        return torch.tensor(losses[implementation])

    monkeypatch.setattr(trial, "run", run)
    with pytest.raises(torch.OutOfMemoryError):
        trial.check("float32")
    trial.check("eager")
    trial.check("compile")
    with pytest.raises(AssertionError, match=r"ours: 2\.5, expected 2\.0"):
        trial.check("ours")
    assert ran == ["float32", "float32", "eager", "compile", "ours"]
