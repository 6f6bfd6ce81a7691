"""``--deterministic``: a run, its evaluation and its confusion matrix give the same bits twice."""

import json
import os

import pytest
import torch

from dfn_fast.checkpoint.archive import read_file
from dfn_fast.evaluate import __main__ as evaluate
from dfn_fast.evaluate import evaluation
from dfn_fast.evaluate.metrics import ConfusionMatrix
from dfn_fast.runtime.device import choose_algorithms, inductor_options
from dfn_fast.train import __main__ as train
from dfn_fast.train.folder import RunFolder
from support.runs import SMALL_RUN, differences, small_runs, timeless_metrics
from support.tiny_resnet import tiny_backbones

on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TINY = "--stem conv7 --border-channels 4"
DEVICES = ["cpu", pytest.param("cuda", marks=on_a_gpu)]
pytestmark = pytest.mark.filterwarnings("error:.*does not have a deterministic implementation")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings_restored(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = before


def trained(folder, device, *words):
    options = [*SMALL_RUN.replace("--no-border --no-deep-supervision", "").split(), *TINY.split(), "--deterministic"]
    with small_runs(), tiny_backbones():
        train.main([*options, "--epochs", "1", "--device", device, *words, "--output-dir", str(folder)])
    return RunFolder(folder)


def evaluated(run, device, number, monkeypatch):
    """The report without its time, and its confusion matrix."""
    matrices = []

    class Watched(ConfusionMatrix):
        def __init__(self, *args):
            super().__init__(*args)
            matrices.append(self)

    file = run.path / f"report-{number}.json"
    monkeypatch.setattr(evaluation, "ConfusionMatrix", Watched)
    options = ["--scales", "0.75", "1", "--flip", "--border", "--deterministic", "--device", device]
    with small_runs(), tiny_backbones():
        evaluate.main([str(run.best), *options, "--json", str(file)])
    report = json.loads(file.read_text())
    del report["seconds"], report["images_per_second"]
    return report, matrices[0].counts


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_and_its_evaluation_give_the_same_bits_twice(
    tmp_path, monkeypatch, two_threads, settings_restored, device
):
    runs = [trained(tmp_path / name, device) for name in ("first", "second")]
    for name in ("last", "best"):  # weights, momenta, random states, losses
        assert differences(*(read_file(getattr(run, name)) for run in runs)) == []
    assert timeless_metrics(runs[0]) == timeless_metrics(runs[1])
    reports = [evaluated(runs[0], device, number, monkeypatch) for number in (1, 2)]
    assert reports[0][0] == reports[1][0]
    assert torch.equal(reports[0][1], reports[1][1])
    assert reports[0][1].sum() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "words",
    [["--amp", "bf16"], ["--amp", "fp16"], ["--compile"], ["--cuda-graph"], ["--model", "reference"]],
    ids=" ".join,
)
def test_every_way_to_run_on_a_gpu_gives_the_same_bits_twice(tmp_path, settings_restored, words):
    runs = [trained(tmp_path / name, "cuda", *words) for name in ("first", "second")]
    assert differences(*(read_file(run.last) for run in runs)) == []
    assert timeless_metrics(runs[0]) == timeless_metrics(runs[1])


@pytest.mark.parametrize("device", DEVICES)
def test_a_confusion_matrix_is_counted_by_deterministic_algorithms(device):
    torch.use_deterministic_algorithms(True)  # raises if an operator is not; the suite's fixture resets it
    generator = torch.Generator().manual_seed(0)
    labels, predictions = (torch.randint(0, 21, (2, 300, 400), generator=generator) for _ in range(2))
    expected = torch.zeros(21, 22, dtype=torch.int64)
    expected.index_put_((labels.flatten(), predictions.flatten()), torch.tensor(1), accumulate=True)
    for _ in range(2):
        confusion = ConfusionMatrix(21)
        confusion.update(labels.to(device), predictions.to(device))
        assert torch.equal(confusion.counts.cpu(), expected)


def test_what_is_asked_of_pytorch(settings_restored):
    choose_algorithms(False)
    assert torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert "deterministic" not in inductor_options()
    choose_algorithms(True)
    assert not torch.backends.cudnn.benchmark
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert inductor_options()["deterministic"]
