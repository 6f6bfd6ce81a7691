"""Two processes compute the same as one. Most checks share one pair of processes, which is slow to start."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.fsdp import FSDPModule

import dfn_fast.evaluate.__main__
import dfn_fast.train.__main__
from dfn_fast.checkpoint.archive import read_file
from dfn_fast.config import TrainConfig
from dfn_fast.data.loader import Batch, TrainLoader
from dfn_fast.data.registry import build_dataset
from dfn_fast.data.transforms import TrainTransform
from dfn_fast.errors import ConfigError, UserError
from dfn_fast.inference.predictor import Predictor
from dfn_fast.network.backbone import BasicBlock
from dfn_fast.network.fast import FastDFN
from dfn_fast.network.losses import SigmoidFocalLoss
from dfn_fast.network.recompute import set_recompute
from dfn_fast.network.reference import ReferenceDFN
from dfn_fast.runtime.processes import ALONE, Agent, World, processes
from dfn_fast.runtime.signals import StopRequest
from dfn_fast.train.__main__ import main
from dfn_fast.train.folder import RunFolder
from dfn_fast.train.loss_watch import LossWatch
from dfn_fast.train.run import Run
from dfn_fast.trainer.build import require_possible
from dfn_fast.trainer.finite import NonFiniteLoss
from dfn_fast.trainer.parallel import SyncBatchNorm, unused_parameters, valid_shares
from support.runs import write_blobs
from support.steps import CLASSES, tiny_batch, tiny_trainer
from support.tiny_resnet import tiny_backbones

PAIR = [World(rank, 2, rank) for rank in range(2)]
TINY = "camvid --data folder --root photos --backbone resnet18 --stem conv7 --channels 8 --border-channels 4 --crop 64"
TINY += " --no-global-context"  # its batch norm over four similar images would magnify rounding
TINY += " --batch-size 4 --lr 0.0002 --border-width 3 --workers 0 --log-every 1 --device cpu --scales 0.75 1"
TINY += " --checkpoint-every 2 --epochs 2 --val-every 2"
EVALUATION = ["two/last.pth", "--root", "photos", "--border", "--device", "cpu", "--json"]
BATCH = 8  # images in a whole step; each process gets half
STEPS = {"float32": 8}  # includes batch 3, whose first half has no valid pixel; other cases: 3 steps
CASES = {
    "float32": {},
    "accumulated": {"accumulate": 2},
    "recomputed": {"memory": "norm"},
    "torchseg": {"focal": "torchseg"},
    "no border loss": {"border_weight": 0.0},
    "reference": {"model": "reference"},
}
FSDP_CASES = {
    "sharded, accumulated": {"fsdp": True, "accumulate": 2},
    "sharded, recomputed": {
        "fsdp": True,
        "memory": "norm",
        "blocks": 2,
    },  # several sharded blocks in one recomputed part
}


def whole_batch(seed: int) -> Batch:
    """Bright classes with unevenly distributed ignored pixels. The first half of batch 3 has no valid pixel."""
    generator = torch.Generator().manual_seed(seed)
    labels = (
        torch.randint(0, CLASSES, (BATCH, 6, 6), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    )
    noise = torch.randint(0, 60, (BATCH, 48, 48, 3), generator=generator)
    images = (40 * labels[..., None] + noise).to(torch.uint8).permute(0, 3, 1, 2)
    draw = torch.rand(labels.shape, generator=generator)
    borders = (draw < 0.3).to(torch.uint8)
    share = torch.linspace(0.9, 0, BATCH)[:, None, None]
    labels[(draw < share) | (seed == 3) & (share > 0.45)] = 255
    borders[(draw > 1 - share / 2) | (seed == 3) & (share > 0.45)] = 255
    return Batch(images, labels.to(torch.uint8), borders, [f"image {seed}.{i}" for i in range(BATCH)])


def cut(batch: Batch, world: World) -> Batch:
    return Batch(*(part[world.share(BATCH)] for part in batch))


def trainer_of(world: World, **settings):
    network = ReferenceDFN if settings.get("model") == "reference" else FastDFN
    focal = SigmoidFocalLoss(torchseg=settings.get("focal") == "torchseg")
    parts = {"aux_criterion": focal}
    with tiny_backbones():
        trainer = tiny_trainer(network=network, parts=parts, world=world, amp="off", lr=0.0005, **settings)
    if trainer.config.memory != "off":
        set_recompute(trainer.model, trainer.config.memory)
    return trainer


def losses_of(trainer, world: World, steps: int, first: int = 0) -> list[float]:
    """Trains a few steps. Returns their losses as a run would log them."""
    watch, passes = LossWatch(trainer), trainer.config.accumulate
    for i in range(first, first + steps):
        batches = [cut(whole_batch(passes * i + k), world) for k in range(passes)]
        watch.add(i, trainer.step(batches, i), [])
    return watch.read()


def outcome(world: World, name: str) -> dict:
    """Trains a case. Returns its losses and state. One process has nothing to shard."""
    settings = (CASES | FSDP_CASES)[name]
    trainer = trainer_of(world, **{**settings, "fsdp": "fsdp" in settings and world.size > 1})
    losses = losses_of(trainer, world, STEPS.get(name, 3))
    state = trainer.state()
    return {"losses": losses, "model": state["model"], "optimizer": state["optimizer"]}


def noisy(predictor: Predictor, image: np.ndarray) -> np.ndarray:
    """Replaces the network, which has learnt too little: predicts a third of the ground as blobs."""
    return (image[..., 0] > 40).astype(np.uint8)


def no_pictures(*what) -> None:
    """Replaces the curves and predictions, which take longer to draw than the runs to train."""


def photos(folder: Path) -> None:
    """Writes twelve training and three validation images, with ignored pixels in all but the first."""
    write_blobs(folder, 12, 3, step=2, ignored=3)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def in_pair(rank: int, ports: list[int], folder: Path) -> None:
    """Does everything that needs two processes. The first writes the results to found.pth."""
    with tiny_backbones():
        work_in_pair(rank, ports, folder)


def work_in_pair(rank: int, ports: list[int], folder: Path) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)  # as under torchrun, so that sums agree to the last bit
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}
    os.environ.update({name: str(value) for name, value in environment.items()})
    found = {}

    def port() -> None:
        os.environ["MASTER_PORT"] = str(ports.pop())

    port()
    dfn_fast.train.__main__.draw = no_pictures
    writes = RunFolder.log, []
    RunFolder.log = lambda self, record: (writes[1].append(record), writes[0](self, record))
    assert main([*TINY.split(), "--output-dir", "two"]) == 0
    RunFolder.log = writes[0]
    port()
    requested = StopRequest.requested
    if rank == 1:  # only one process is asked to stop
        StopRequest.requested = property(lambda self: len(seen) > 2)
    seen, step = [], Run.show
    Run.show = lambda self, *words: (seen.append(self.position.iteration), step(self, *words))
    assert main([*TINY.split(), "--output-dir", "stopped"]) in (0, 128)
    StopRequest.requested = requested
    port()
    call, Predictor.__call__ = Predictor.__call__, noisy
    assert dfn_fast.evaluate.__main__.main([*EVALUATION, "two.json"]) == 0
    Predictor.__call__ = call
    port()
    with processes() as world:
        found["writes"], found["stops"] = world.gather([len(writes[1])]), world.gather([seen[-1]])
        for name in CASES:
            found[name] = outcome(world, name)
        found["averaged"] = averaged(world)
        found["nan"] = world.gather([nan_error(world)])
        found["refused"] = world.gather([refusal(world)])
        found["norm"] = world.gather([norm_outputs(world)])
        for name in FSDP_CASES:
            found[name] = outcome(world, name)
        found["resumed"] = resumed(world)
    if rank == 0:
        torch.save(found, "found.pth")


def averaged(world: World) -> list[bool]:
    """Whether gradients were averaged in each of two accumulated passes."""
    trainer, seen = trainer_of(world, accumulate=2), []
    run = trainer.forward_backward
    trainer.forward_backward = lambda *batch: (seen.append(trainer.loss.require_backward_grad_sync), run(*batch))[1]
    losses_of(trainer, world, 1)
    return seen


def nan_error(world: World) -> str:
    """This process's error for a loss that is not finite in the second process only."""
    watch = LossWatch(trainer_of(world))
    watch.add(4, torch.tensor(float("nan") if world.rank else 1.0), [f"image {world.rank}"])
    with pytest.raises(NonFiniteLoss) as caught:
        watch.read()
    return str(caught.value)


def refusal(world: World) -> str:
    def decide():
        assert world.is_first
        raise ConfigError("refused by the first")

    with pytest.raises(ConfigError) as caught:
        world.from_first(decide)
    return str(caught.value)


def norm_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Features so far from 0 that a mean of squares would lose its digits, and their output gradient."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 5, 7, 3)
    features = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1000
    return features, torch.randn(shape, generator=generator, dtype=torch.float64)


def norm_results(layer: torch.nn.Module, dtype: torch.dtype, rows: slice) -> dict[str, torch.Tensor]:
    features, gradient = (x[rows].to(dtype) for x in norm_inputs())
    layer = layer.to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, 5))
        layer.bias.copy_(torch.linspace(-1, 1, 5))
    features.requires_grad_()
    out = layer(features)
    out.backward(gradient)
    return {"out": out.detach(), "d_x": features.grad, "d_weight": layer.weight.grad, "d_bias": layer.bias.grad} | {
        name: buffer.clone() for name, buffer in layer.named_buffers()
    }


def norm_outputs(world: World) -> dict:
    rows = world.share(4)
    return {str(dtype): norm_results(SyncBatchNorm(5), dtype, rows) for dtype in (torch.float32, torch.float64)}


def resumed(world: World) -> dict:
    """Continues a checkpoint of an unsharded one-process run with sharding."""
    trainer = trainer_of(world, fsdp=True)
    trainer.load_state(torch.load("plain.pth", weights_only=True))
    losses = losses_of(trainer, world, 2, first=3)
    whole = trainer.network()  # the network that validation uses, whole on every process
    assert type(whole) is FastDFN
    state = trainer.state()
    assert world.is_first or not state["model"]
    momenta = [kept["momentum_buffer"] for kept in state["optimizer"]["state"].values()]
    assert momenta
    assert all((momentum is not None) == world.is_first for momentum in momenta)  # whole in the one that writes
    same = all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in state["model"].items())
    units = [name for name, module in trainer.model.named_modules() if isinstance(module, FSDPModule)]
    return {"losses": losses, "model": state["model"], "optimizer": state["optimizer"], "same": same, "units": units}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of the two processes and their results. It also has a run of one process."""
    folder = tmp_path_factory.mktemp("pair")
    photos(folder / "photos")
    trainer = trainer_of(ALONE)
    losses_of(trainer, ALONE, 3)
    torch.save(trainer.state(), folder / "plain.pth")
    context = torch.multiprocessing.start_processes(
        in_pair, ([free_port() for _ in range(4)], folder), nprocs=2, join=False, start_method="spawn"
    )
    with pytest.MonkeyPatch.context() as patch, tiny_backbones():
        patch.chdir(folder)
        patch.setattr("dfn_fast.train.__main__.draw", no_pictures)
        main([*TINY.split(), "--output-dir", "one"])
    while not context.join(timeout=10):
        pass
    return folder, torch.load(folder / "found.pth", weights_only=True)


def largest_difference(a: dict, b: dict) -> float:
    """The largest difference between two state dicts, relative to the largest value of each tensor."""
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max() / b[n].double().abs().max().clamp(min=0.1)) for n in b)


@pytest.mark.parametrize("name", [*CASES, *FSDP_CASES])
def test_two_processes_train_as_one(pair, name):
    _, found = pair
    alone = outcome(ALONE, name)
    assert max(alone["losses"]) - min(alone["losses"]) > 1e-3
    assert found[name]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert largest_difference(found[name]["model"], alone["model"]) < 1e-3
    momenta = [{str(i): s["momentum_buffer"] for i, s in x["optimizer"]["state"].items()} for x in (found[name], alone)]
    assert momenta[0].keys() == momenta[1].keys()


def test_gradients_are_averaged_only_in_the_last_pass(pair):
    assert pair[1]["averaged"] == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_synchronised_norm_is_that_of_the_whole_batch(pair, dtype):
    parts = [part[str(dtype)] for part in pair[1]["norm"]]
    expected = norm_results(torch.nn.BatchNorm2d(5), torch.float64, slice(None))
    bound = {torch.float32: 2e-3, torch.float64: 1e-10}[dtype]  # eps of float32 at 1000, over a deviation of 3
    for name in ("out", "d_x"):
        whole = torch.cat([part[name] for part in parts]).double()
        torch.testing.assert_close(whole, expected[name], rtol=bound, atol=bound)
    for name in ("d_weight", "d_bias"):
        whole = sum(part[name] for part in parts).double()
        torch.testing.assert_close(whole, expected[name], rtol=bound, atol=bound * 10)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(parts[0][name], parts[1][name])
        torch.testing.assert_close(parts[0][name].double(), expected[name].double(), rtol=bound, atol=0)


def test_a_loss_that_is_not_finite_stops_all_with_the_same_error(pair):
    first, second = pair[1]["nan"]
    assert first == second
    assert "iteration 5; the images were image 0, image 1." in first


def test_an_error_of_the_first_process_is_raised_in_all(pair):
    assert pair[1]["refused"] == ["refused by the first"] * 2


def test_a_stop_of_one_process_stops_all_at_one_iteration(pair):
    folder, found = pair
    first, second = found["stops"]
    assert first == second == read_file(folder / "stopped" / "last.pth")["position"]["iteration"] == 4


def test_a_run_of_two_processes_is_that_of_one(pair):
    folder, found = pair
    one, two = RunFolder(folder / "one"), RunFolder(folder / "two")
    assert sorted(p.name for p in two.path.iterdir()) == sorted(p.name for p in one.path.iterdir())
    assert found["writes"] == [len(two.metrics()), 0]
    for a, b in zip(one.metrics(), two.metrics(), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"kind", "images_per_second", "seconds"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=2e-3 if "iou" in key else 1e-5), (a, b)
    assert json.loads(two.summary_file.read_text())["execution"]["processes"] == 2


def test_sharded_evaluation_equals_unsharded(pair, monkeypatch):
    folder, _ = pair
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Predictor, "__call__", noisy)
    with tiny_backbones():
        dfn_fast.evaluate.__main__.main([*EVALUATION, "one.json"])
    one, two = (json.loads(Path(name).read_text()) for name in ("one.json", "two.json"))
    for report in (one, two):
        del report["seconds"], report["images_per_second"]
    assert one["images"] == 3
    assert 0 < one["boundary_f_score"] < 1
    assert 0 < one["mean_iou"] < 1
    assert two.pop("boundary_f_score") == pytest.approx(one.pop("boundary_f_score"), rel=1e-12)
    assert two == one


def test_checkpoints_go_from_plain_to_sharded_and_back(pair):
    folder, found = pair
    plain = trainer_of(ALONE)
    plain.load_state(torch.load(folder / "plain.pth", weights_only=True))
    losses = losses_of(plain, ALONE, 2, first=3)
    assert found["resumed"]["losses"] == pytest.approx(losses, rel=1e-5)
    assert found["resumed"]["same"]
    # Each block of the backbone is whole only while it runs, and so is the rest of the network as one.
    blocks = [name for name, module in plain.model.named_modules() if isinstance(module, BasicBlock)]
    assert len(blocks) >= 4
    assert found["resumed"]["units"] == ["", *blocks]
    # The sharded run's checkpoint loads into a plain trainer with all weights and momenta.
    again = trainer_of(ALONE)
    again.load_state({**plain.state(), **{key: found["resumed"][key] for key in ("model", "optimizer")}})
    expected = losses_of(plain, ALONE, 2, first=5)
    assert losses_of(again, ALONE, 2, first=5) == pytest.approx(expected, rel=1e-5)
    assert largest_difference(again.state()["model"], plain.state()["model"]) < 1e-3


def worker_of(agent: int, rank: int) -> int:
    """The process id of a torchrun worker."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return next(int(pid) for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())


def train_in_pair(rank: int, port: int, folder: Path) -> None:
    """One of two processes of an undisturbed run."""
    os.chdir(folder)
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    dfn_fast.train.__main__.draw = no_pictures
    with tiny_backbones():
        assert main([*TINY.split(), "--output-dir", "two"]) == 0


@pytest.mark.slow  # starts torchrun, and seven processes import PyTorch
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker in /proc")
def test_a_killed_worker_is_started_again_and_changes_no_bit(tmp_path):
    photos(tmp_path / "photos")
    torch.multiprocessing.start_processes(train_in_pair, (free_port(), tmp_path), nprocs=2, start_method="spawn")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command += ["-m", "support.tiny_train", *TINY.split()]  # the default folder, which a restart must not change
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        last = tmp_path / "runs" / "camvid" / "last.pth"
        # Saving iteration 2 renames the first checkpoint to previous.pth.
        while not last.with_name("previous.pth").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        os.kill(worker_of(process.pid, 1), signal.SIGKILL)
        out, err = process.communicate(timeout=250)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert os.listdir(tmp_path / "runs") == ["camvid"]
    assert "goes on from iteration 2" in out
    assert out.count("training FastDFN") == 2  # only the first process prints it, once per start
    killed, undisturbed = (read_file(path)["model"] for path in (last, tmp_path / "two" / "last.pth"))
    assert [name for name in killed if not torch.equal(killed[name], undisturbed[name])] == []


@pytest.fixture
def agent_store(monkeypatch):
    """The store of a torchrun agent with this process as its only worker."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def test_a_run_that_died_before_a_checkpoint_starts_anew(agent_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    with tiny_backbones():
        with monkeypatch.context() as patch:
            patch.setattr(Run, "train", lambda self: self.folder.log({"kind": "train", "iteration": 1}) or 1 / 0)
            with pytest.raises(ZeroDivisionError):
                main(TINY.split())
        assert main([*TINY.split(), "--stop-after", "2"]) == 0
    assert os.listdir("runs") == ["camvid"]
    assert [record["iteration"] for record in RunFolder("runs/camvid").metrics()] == [1, 2]


def test_another_runs_folder_is_not_continued_by_a_restart(agent_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    RunFolder("other").start(TrainConfig())
    for _ in range(2):  # torchrun would retry
        with pytest.raises(ConfigError, match="holds a run already"):
            main([*TINY.split(), "--output-dir", "other"])
    assert Agent().folder() is None


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shards_of_an_epoch_cover_its_batches_once(size):
    dataset = build_dataset("synthetic", None, "val")
    worlds = [World(rank, size) for rank in range(size)]
    transform = TrainTransform((32, 32), (1.0,), True, 3)

    def keys(share: slice) -> list:
        loader = TrainLoader(dataset, transform, batch_size=6, seed=1, workers=0, share=share)
        loader._loader = []  # only the order is tested: no sample is drawn
        list(loader.epoch(3, 1))
        return loader._keys

    whole, parts = keys(slice(None)), [keys(world.share(6)) for world in worlds]
    assert [list(chain(*batch)) for batch in zip(*parts, strict=True)] == whole
    images = [number for world in worlds for number in dfn_fast.evaluate.evaluation.images_of(world, 10)]
    assert sorted(images) == list(range(10))


@pytest.mark.parametrize(("batch", "size", "near"), [(10, 4, "8 or 12"), (3, 4, "4"), (7, 2, "6 or 8")])
def test_a_batch_that_does_not_divide_is_an_error(batch, size, near):
    with pytest.raises(ConfigError, match=rf"--batch-size {batch} .*multiple of {size}, such as {near}$"):
        World(0, size).share(batch)


def test_the_shares_make_the_mean_over_all_valid_pixels(monkeypatch):
    batch = tiny_batch()
    parts = [[x[rows] for x in batch[1:3]] for rows in (slice(0, 1), slice(1, 3))]
    parts[0][0] = torch.full_like(parts[0][0], 255)
    counts = [torch.stack([(x != 255).sum() for x in part]).double() for part in parts]
    monkeypatch.setattr(World, "sum", lambda self, x: counts[0] + counts[1])
    found = [valid_shares(world, *part) for world, part in zip(PAIR, parts, strict=True)]
    for own, count in zip(found, counts, strict=True):
        torch.testing.assert_close(own, (2 * count / (counts[0] + counts[1])).float())
    assert found[0][0] == 0
    assert found[1][0] == 2


@pytest.mark.parametrize("border_weight", [0.1, 0.0])
def test_parameters_not_waited_for_are_those_without_gradient(border_weight):
    trainer = tiny_trainer(border_weight=border_weight)
    trainer.forward_backward(*tiny_batch()[:3])
    without = [id(p) for p in trainer.model.parameters() if p.grad is None]
    assert without == [id(p) for p in unused_parameters(trainer.model)]
    assert without


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        ({"fsdp": True}, ALONE, "start it with torchrun, or add --no-fsdp"),
        ({"cuda_graph": True}, PAIR[0], "--cuda-graph records the work of one process"),
    ],
)
def test_options_that_forbid_the_number_of_processes(changes, world, message):
    with pytest.raises(ConfigError, match=message):
        require_possible(dataclasses.replace(TrainConfig(), **changes), world)


@pytest.mark.parametrize("changes", [{"compile": True}, {"cuda_graph": True}])
def test_fsdp_does_not_go_with_a_step_in_one_graph(changes):
    with pytest.raises(ConfigError, match="leave out --compile and --cuda-graph"):
        TrainConfig(fsdp=True, **changes)


def test_every_process_has_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [World(5, 6, 1).device_name(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    assert ALONE.device_name("cuda:1") == "cuda:1"
    with pytest.raises(ConfigError, match="is one for 6 processes"):
        World(5, 6, 1).device_name("cuda:1")
    with pytest.raises(UserError, match="more processes than the 2 CUDA devices"):
        World(5, 6, 2).device_name("auto")
