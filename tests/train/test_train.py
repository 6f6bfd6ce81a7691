import contextlib
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from dfn_fast.checkpoint.archive import read_file
from dfn_fast.data import base
from dfn_fast.errors import CheckpointError, ConfigError, DataError
from dfn_fast.inference.loading import load_model
from dfn_fast.train import report
from dfn_fast.train.__main__ import main
from dfn_fast.train.folder import RunFolder
from dfn_fast.trainer.build import poly
from dfn_fast.trainer.finite import NonFiniteLoss
from dfn_fast.trainer.trainer import Trainer
from support.runs import TINY_RUN, differences, timeless_metrics


@pytest.fixture(scope="module")
def undisturbed(narrow, photos, tmp_path_factory):
    """An undisturbed run, pictures included, and its output."""
    folder, printed = tmp_path_factory.mktemp("runs") / "undisturbed", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["camvid", *TINY_RUN.split(), "--root", str(photos), "--output-dir", str(folder)]) == 0
    return RunFolder(folder), printed.getvalue()


def test_a_run_leaves_all_that_it_promises(undisturbed):
    run, printed = undisturbed
    last_line = printed.splitlines()[-1]
    assert str(run.path) in last_line
    assert "mIoU" in last_line
    summary = json.loads(run.summary_file.read_text())
    assert 0 <= summary["last_mean_iou"] <= summary["best_mean_iou"] <= 1
    assert set(summary["per_class_iou"]) == {"ground", "blob"}
    for name in ("images_per_second", "seconds", "peak_memory_bytes"):
        assert summary[name] > 0
    assert summary["versions"]["torch"] == torch.__version__
    assert "cpu" in summary["device"]
    assert summary["checkpoint"] == str(run.best)
    for picture in ("curves.png", "predictions.png"):
        assert Image.open(run.path / picture).size[0] > 200
    records = run.metrics()
    train = [r for r in records if r["kind"] == "train"]
    assert [r["iteration"] for r in train] == [1, 2, 3, 4, 5, 6]
    assert [r["epoch"] for r in records if r["kind"] == "val"] == [1, 2]
    assert [r["lr"] for r in train] == pytest.approx([0.001 * poly(i, 6, 0.9) for i in range(6)])
    loaded = load_model(run.best)
    assert loaded.classes == ("ground", "blob")
    assert loaded.dataset == "folder"


def test_a_later_validation_that_is_worse_leaves_the_best_network(tiny, monkeypatch):
    scores = iter([0.5, 0.25])

    def worse(*arguments, **options):
        assert options["timeout"] == 70
        return dataclasses.replace(real(*arguments, **options), mean_iou=next(scores))

    real = report.evaluate
    monkeypatch.setattr(report, "evaluate", worse)
    run = tiny("run", "--loader-timeout", "70")
    assert read_file(run.best)["position"]["iteration"] == 3
    position = read_file(run.last)["position"]
    assert (position["best_mean_iou"], position["last_mean_iou"]) == (0.5, 0.25)


@pytest.mark.parametrize("stop", [2, 3], ids=["within an epoch", "at its end"])
def test_a_resumed_run_ends_with_the_same_bits(undisturbed, tiny, stop, capsys):
    straight, _ = undisturbed
    tiny("halves", "--stop-after", str(stop))
    assert "--resume --output-dir" in capsys.readouterr().out
    halves = tiny("halves", "--resume")
    assert differences(read_file(straight.last), read_file(halves.last)) == []
    assert timeless_metrics(straight) == timeless_metrics(halves)


def test_another_seed_gives_another_run(tiny):
    first, second = tiny("first", "--stop-after", "1"), tiny("second", "--stop-after", "1", "--seed", "1")
    assert differences(read_file(first.last)["model"], read_file(second.last)["model"])


def test_workers_change_nothing(tiny):
    alone, together = tiny("alone", "--stop-after", "2"), tiny("together", "--stop-after", "2", "--workers", "2")
    assert differences(read_file(alone.last)["model"], read_file(together.last)["model"]) == []


@pytest.mark.parametrize(
    ("number", "code", "send"),
    [
        pytest.param(signal.SIGINT, 130, os.kill, marks=pytest.mark.slow, id="Ctrl-C"),
        pytest.param(signal.SIGINT, 130, getattr(os, "killpg", None), marks=pytest.mark.slow, id="Ctrl-C to all"),
        pytest.param(signal.SIGTERM, 143, getattr(os, "killpg", None), marks=pytest.mark.slow, id="SIGTERM to all"),
        pytest.param(signal.SIGTERM, 143, os.kill, id="SIGTERM"),
    ],
)
def test_a_signal_saves_and_leaves(photos, tmp_path, number, code, send):
    """A terminal's Ctrl-C and a cluster's SIGTERM reach the loading processes too."""
    run = RunFolder(tmp_path / "run")
    command = [sys.executable, "-m", "dfn_fast.train", "camvid", *TINY_RUN.split(), "--root", str(photos)]
    command += ["--epochs", "5000", "--workers", "2", "--output-dir", str(run.path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(run.metrics()) < 2 and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        send(process.pid, number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert "saved in" in out
    assert "Traceback" not in err
    iteration = read_file(run.last)["position"]["iteration"]
    assert max(r["iteration"] for r in run.metrics()) == iteration >= 1


def test_a_loss_that_is_not_finite_names_iteration_images_and_checkpoint(tiny):
    last = r"\(the last finite checkpoint is .*run.last\.pth\)"
    with pytest.raises(NonFiniteLoss, match=r"at iteration \d+; the images were \d+, \d+, \d+.*" + last):
        tiny("run", "--lr", "1e6")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=["device", "host", "Python"],
)
def test_a_step_that_takes_too_much_memory_says_what_to_lower(tiny, tmp_path, monkeypatch, error):
    def step(*_):
        raise error

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(
        ConfigError, match=r"memory of cpu is too small for iteration 1, with --batch-size 3 and --crop"
    ):
        tiny("run")
    assert read_file(tmp_path / "run" / "last.pth")["position"]["iteration"] == 0


def test_weights_that_are_not_finite_are_not_saved(tiny, monkeypatch):
    run = tiny("run", "--stop-after", "1")
    before = run.last.read_bytes()
    monkeypatch.setattr(
        "dfn_fast.trainer.trainer.Trainer.step",
        lambda self, *_: self.model.backbone.bn1.weight.detach().fill_(torch.inf).sum() * 0,
    )
    monkeypatch.setattr("dfn_fast.train.loss_watch.LossWatch.read", lambda self: [0.0])
    with pytest.raises(NonFiniteLoss, match="weights are no longer finite"):
        tiny("run", "--resume", "--stop-after", "2")
    assert run.last.read_bytes() == before


def test_a_full_disk_keeps_the_old_checkpoint(tiny, monkeypatch):
    run = tiny("run", "--stop-after", "2")
    before = run.last.read_bytes()

    def full(content, file):
        file.write(b"half a checkpoint")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"\.pth: could not be written.*No space left"):
        tiny("run", "--resume")
    assert run.last.read_bytes() == before
    assert not list(run.path.glob(".*"))


def write_damaged_lines(path):
    path.write_bytes(b'{"kind": "train", "epoch": 1, "iteration": 1, "loss": "low"}\n\xff')


def put_a_folder_there(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "text"),
    [(write_damaged_lines, "left out 2 damaged lines"), (put_a_folder_there, "curves.png has no values: ")],
)
def test_damaged_metrics_cost_a_run_neither_summary_nor_pictures(tiny, monkeypatch, capsys, damage, text):
    def summarise(trainer, *arguments):
        damage(run.metrics_file)
        return report.summarise(trainer, *arguments)

    run = tiny("run", "--stop-after", "5")
    monkeypatch.setattr("dfn_fast.train.__main__.draw", report.draw)
    monkeypatch.setattr("dfn_fast.train.__main__.summarise", summarise)
    tiny("run", "--resume")
    for path in (run.summary_file, run.curves, run.predictions):
        assert path.stat().st_size > 100
    assert text in capsys.readouterr().err


def test_a_run_starts_from_the_weights_of_another(tiny):
    first = tiny("first", "--stop-after", "1")
    second = tiny("second", "--weights", str(first.last), "--stop-after", "1", "--lr", "0")
    old, new = read_file(first.last)["model"], read_file(second.last)["model"]
    assert torch.equal(old["backbone.conv1.0.weight"], new["backbone.conv1.0.weight"])


def test_weights_that_fit_in_part_are_an_error_or_named(tiny, capsys):
    first = tiny("first", "--stop-after", "1")
    with pytest.raises(CheckpointError, match="wrong shape"):
        tiny("second", "--weights", str(first.last), "--border-channels", "5")
    tiny("second", "--weights", str(first.last), "--border-channels", "5", "--no-strict", "--stop-after", "1")
    assert "loaded the tensors that fit; " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--root", "nowhere"], ConfigError, "nowhere"),
        (["--train-split", "tests"], ConfigError, "tests"),
        (["--batch-size", "10"], ConfigError, "10 is more than the 9"),
        (["--accumulate", "4"], ConfigError, "--accumulate 4 is more than the 3 batches"),
        (["--device", "cuda:99"], ConfigError, "cuda:99"),
        (["--device", "toaster"], ConfigError, "toaster"),
        (["--amp", "fp16"], ConfigError, "needs a GPU"),
        (["--weights", "nowhere.pth"], CheckpointError, "nowhere.pth"),
        (["--data", "fodler"], ConfigError, "did you mean folder"),
        (
            ["--crop", "16384", "--batch-size", "9000"],
            ConfigError,
            "9000 with --crop 16384x16384 needs .* cpu has",
        ),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_written(tiny, tmp_path, words, error, message):
    with pytest.raises(error, match=message):
        tiny("run", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # from runpy, about the imports above
def test_a_user_error_has_no_traceback(tmp_path, monkeypatch, capsys):
    """Runs ``python -m dfn_fast.train`` in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "camvid", "--root", "nowhere"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("dfn_fast.train", run_name="__main__", alter_sys=True)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert "nowhere" in printed
    assert "Traceback" not in printed
    assert os.listdir(tmp_path) == []


def test_accumulated_gradients_are_the_mean(tiny):
    """Accumulating two equal batches gives the result of one batch: the average, not the sum."""
    # With one image size and no augmentation, an epoch of two repeated images gives equal batches.
    from dfn_fast.config import TrainConfig
    from dfn_fast.data.loader import Batch
    from dfn_fast.trainer.build import build_model
    from dfn_fast.trainer.trainer import Trainer

    def weights(accumulate):
        config = TrainConfig(
            backbone="resnet18",
            channels=8,
            border_channels=4,
            crop=(32, 32),
            accumulate=accumulate,
            lr=0.1,
            device="cpu",
        )
        torch.manual_seed(0)
        trainer = Trainer(build_model(config, 3), config, 10, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 3, (2, 32, 32), generator=generator, dtype=torch.uint8)
        batch = Batch(images, labels, (labels == 1).to(torch.uint8), ["a", "b"])
        trainer.step([batch] * accumulate, 0)
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    torch.testing.assert_close(weights(2), weights(1), rtol=1e-5, atol=1e-6)


def test_a_worker_that_dies_or_hangs_ends_the_run_with_its_sample(tiny, photos, monkeypatch):
    def hostile(how):
        def read(path, *more):
            if str(path).endswith("train/images/07.png") and multiprocessing.parent_process() is not None:
                how()
            return real(path, *more)

        return read

    real = base.read_image
    for name, how, text in (
        ("killed", lambda: os.kill(os.getpid(), signal.SIGKILL), "a loading process has died"),
        ("hangs", lambda: time.sleep(3600), "no batch came from the loading processes for 5 s"),
    ):
        monkeypatch.setattr(base, "read_image", hostile(how))
        with pytest.raises(DataError, match=rf"{text}(.|\n)*train/images/07\.png with .*train/masks/07\.png"):
            tiny(name, "--workers", "2", "--loader-timeout", "5")


def test_a_worker_that_dies_during_a_step_ends_the_run_by_name_too(tiny, monkeypatch):
    others = multiprocessing.active_children()  # left by earlier tests

    def step(*_):
        for worker in multiprocessing.active_children():
            if worker not in others:
                os.kill(worker.pid, signal.SIGKILL)
        time.sleep(60)  # PyTorch raises here, on the signal that a child has died

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(DataError, match="a loading process has died"):
        tiny("run", "--workers", "1")


def test_a_damaged_checkpoint_is_not_continued(tiny):
    folder = tiny("run", "--stop-after", "1")
    whole = read_file(folder.last)
    wrong = [{"position": value} for value in (3, {"epoch": "one"}, {"wings": 1})]
    wrong += [{"optimizer": {}}, {"random": {}}, {"random": [1, 2]}, {"model": {"a": torch.zeros(1)}}]
    for changes in wrong:
        torch.save({**whole, **changes}, folder.last)
        with pytest.raises(CheckpointError, match=r"run/last\.pth: this is not the checkpoint of a run of this net"):
            tiny("run", "--resume")


def test_lines_of_the_metrics_that_are_no_records_are_left_out(tiny):
    folder = tiny("run", "--stop-after", "2")
    kept = folder.metrics()
    with folder.metrics_file.open("ab") as file:
        file.write(
            b'[1]\n{"kind": []}\n{"kind": "train"}\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"kind": "val", "epoch": "x"}\n'
        )
    folder.forget_after(2, 0)
    assert folder.metrics() == kept
    assert len(kept) == 2
