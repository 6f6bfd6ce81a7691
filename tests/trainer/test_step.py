"""The training step: layout, compilation, waiting for the device, optimiser."""

import contextlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dfn_fast.checkpoint.archive import read_file
from dfn_fast.data.datasets.synthetic import SyntheticScenes
from dfn_fast.runtime.device import choose_compile, inductor_options
from dfn_fast.runtime.signals import StopRequest
from dfn_fast.train.__main__ import main
from dfn_fast.train.folder import RunFolder
from dfn_fast.train.loss_watch import MAX_SKIPPED, LossWatch
from dfn_fast.train.position import Position
from dfn_fast.train.run import Run
from dfn_fast.trainer.build import TrainingLoss, compile_loss
from dfn_fast.trainer.finite import NonFiniteLoss
from dfn_fast.trainer.trainer import Trainer
from support.layout_changes import layout_changes
from support.networks import narrow_backbones
from support.steps import COUNT, tiny_batch, tiny_trainer, with_scaler

SYNTHETIC = "--channels 8 --no-border --no-deep-supervision --crop 32 --batch-size 3 --workers 0 --device cpu"


def gradients(loss_fn, trainer, batch):
    trainer.model.zero_grad(set_to_none=True)
    loss = loss_fn(*batch[:3])
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


# On a CPU these process scores of few channels in their own order, rows before columns.
OWN_ORDER = (
    "dfn_kernels::upsample_cross_entropy >",
    "dfn_kernels::upsample_focal_loss >",
    "dfn_kernels::upsample_loss_bwd",
)


@pytest.fixture
def few_scenes(monkeypatch):
    """Limits the synthetic data to twelve training and two validation images."""
    monkeypatch.setattr("dfn_fast.data.datasets.synthetic.LENGTHS", {"train": 12, "val": 2})


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """Narrows the backbones: the published ResNet-18 would take most of the time."""
    with narrow_backbones(resnet18=1):
        yield


# Layout


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_no_activation_changes_its_layout_within_a_step(amp):
    trainer, batch = tiny_trainer(amp=amp), tiny_batch()
    trainer.step([batch], 0)
    changes = layout_changes(lambda: trainer.step([batch], 1), COUNT)
    assert [change for change in changes if not any(name in change for name in OWN_ORDER)] == []


def test_a_change_of_layout_is_seen():
    x = torch.randn(COUNT, 4, 5, 5)
    assert len(layout_changes(lambda: x.to(memory_format=torch.channels_last), COUNT)) == 1
    assert layout_changes(lambda: x.clone(), COUNT) == []
    trainer, batch = tiny_trainer(), tiny_batch()
    forward = trainer.model.smooth_loss
    trainer.model.smooth_loss = lambda score, label: forward(score.contiguous(), label)
    assert any("-> (0, 1, 2, 3)" in change for change in layout_changes(lambda: trainer.step([batch], 0), COUNT))


# Compilation


@pytest.mark.parametrize(
    "backend",
    # Inductor on the smallest network only: it calls a C++ compiler for each fused kernel.
    ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
def test_the_compiled_step_is_one_graph_and_the_same_numbers(backend):
    parts = {"border": False, "deep_supervision": False, "stem": "conv7"} if backend == "inductor" else {}
    trainer, batch = tiny_trainer(parts=parts), tiny_batch()
    trainer.model.double()
    loss = TrainingLoss(trainer.model, trainer.device, torch.float64)
    statistics = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    expected, expected_grads = gradients(loss, trainer, batch)
    expected_statistics = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    trainer.model.load_state_dict(statistics, strict=False)
    compiled = (
        compile_loss(loss)
        if backend == "inductor"
        else torch.compile(loss, fullgraph=True, dynamic=False, backend=backend)
    )
    actual, grads = gradients(compiled, trainer, batch)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        scale = expected_grads[name].abs().max().item()
        torch.testing.assert_close(grad, expected_grads[name], rtol=0, atol=1e-9 * max(scale, 1e-3), msg=name)
    for name, buffer in trainer.model.named_buffers():
        torch.testing.assert_close(buffer, expected_statistics[name], rtol=1e-10, atol=1e-12, msg=name)


def test_inductor_keeps_channels_last_where_a_convolution_narrows():
    """Asks Inductor's own heuristic what it would do on a GPU. On a CPU the graph is always channels_last."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        x, weight = torch.empty(2, 16, 8, 8, device="cuda"), torch.empty(8, 16, 3, 3, device="cuda")
        graph = make_fx(lambda x, weight: F.conv2d(x, weight, padding=1))(x, weight)
    assert not GraphLowering.decide_layout_opt(graph, is_inference=False)
    with config.patch(inductor_options(force_layout_optimization=True)):
        assert GraphLowering.decide_layout_opt(graph, is_inference=False)


def test_a_run_compiles_once(tmp_path, monkeypatch, few_scenes):
    """Two epochs with validations, and a profile in the second, use one graph from the first step."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_loss(loss):
        return torch.compile(loss, fullgraph=True, dynamic=False, backend=counting)

    monkeypatch.setattr("dfn_fast.trainer.trainer.compile_loss", compile_loss)
    monkeypatch.setattr("dfn_fast.train.__main__.draw", lambda *_: None)
    words = [*SYNTHETIC.split(), "--epochs", "2", "--compile", "--profile"]
    assert main(["synthetic", *words, "--output-dir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["execution"]["compile"] is True
    assert [r["epoch"] for r in RunFolder(tmp_path / "run").metrics() if r["kind"] == "val"] == [1, 2]
    assert (tmp_path / "run" / "trace.json.gz").exists()
    assert len(graphs) == 1


def test_compiling_is_the_default_on_cuda_alone():
    assert not choose_compile(None, torch.device("cpu"))
    assert choose_compile(None, torch.device("cuda"))
    assert choose_compile(True, torch.device("cpu"))
    assert not choose_compile(False, torch.device("cuda"))


# Waiting for the device


class Reads(TorchDispatchMode):
    """Records each read of tensor values by the host, which would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "equal", "is_nonzero"):
            self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.fixture
def reads(monkeypatch):
    """A list that grows with every read. ``tolist`` and ``numpy`` bypass the dispatcher on a CPU and are patched."""
    monkeypatch.setattr("dfn_fast.network.losses.readable", lambda labels: False)  # as on a GPU
    with Reads() as mode:
        for name in ("tolist", "numpy", "cpu", "__array__"):
            original = getattr(torch.Tensor, name)

            def read(self, *args, _name=name, _original=original, **kwargs):
                mode.found.append(_name)
                return _original(self, *args, **kwargs)

            monkeypatch.setattr(torch.Tensor, name, read)
        yield mode.found


def test_a_step_reads_nothing(reads):
    trainer, batch = tiny_trainer(), tiny_batch()
    reads.clear()
    loss = trainer.step([batch, batch], 0)
    assert reads == []
    loss.item()
    assert reads == ["_local_scalar_dense"]


def test_losses_are_read_every_nth_iteration(tmp_path, reads, monkeypatch, few_scenes):
    config = main_config("--iterations", "7", "--log-every", "3", "--no-flip", "--output-dir", str(tmp_path))
    run = Run(config, RunFolder(tmp_path / "run"), StopRequest())
    run.folder.start(config)
    run.read_every = config.log_every  # as on a GPU
    run.steps = 7  # one epoch
    step, read, log = run.trainer.step, LossWatch.read, []

    def counted(batches, iteration):
        before = len(reads)
        loss = step(batches, iteration)
        log.append(("step", iteration, len(reads) - before))
        return loss

    run.trainer.step = counted
    monkeypatch.setattr(LossWatch, "read", lambda self: (log.append(("read", len(self.pending))), read(self))[1])
    batches = list(run.loader.epoch(0))
    monkeypatch.setattr(run.loader, "epoch", lambda *_: iter((batches * 7)[:7]))
    reads.clear()
    run.train_epoch(Silent(), Silent())
    assert [entry for entry in log if entry[0] == "step"] == [("step", i, 0) for i in range(7)]
    assert [i for i, entry in enumerate(log) if entry[0] == "read"] == [3, 7, 9]  # after steps 3, 6 and 7 (the last)
    assert reads == ["tolist"] * 3


def test_the_seed_of_a_run_is_that_of_its_scenes(tmp_path, few_scenes):
    """Another seed gives other weights and another order in any case; here the images themselves differ."""
    runs = [Run(main_config("--seed", seed), RunFolder(tmp_path), StopRequest()) for seed in ("3", "4")]
    for run, seed in zip(runs, (3, 4), strict=True):
        for dataset in (run.train_set, run.val_set):
            assert np.array_equal(dataset[0].image, SyntheticScenes(dataset.split, seed=seed)[0].image)
    assert not np.array_equal(runs[0].train_set[0].image, runs[1].train_set[0].image)


def main_config(*words):
    from dfn_fast.train.options import new_config, parser

    return new_config(parser().parse_args(["synthetic", *SYNTHETIC.split(), *words]))


class Silent:
    """A progress bar and a board that show nothing."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_step_on_a_gpu_waits_for_nothing(amp):
    trainer, batch = tiny_trainer("cuda", amp=amp), tiny_batch()
    batch = batch._replace(**{name: getattr(batch, name).cuda() for name in ("images", "labels", "borders")})
    for i in range(2):
        trainer.step([batch], i)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [trainer.step([batch], i) for i in range(2, 5)]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert torch.isfinite(torch.stack(losses)).all()


# The optimiser


def test_gradients_are_gone_after_a_step():
    trainer = tiny_trainer()
    trainer.step([tiny_batch()], 0)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_the_fused_update_is_sgd():
    """Compares with the formula: momentum 0.9, weight decay on every weight, the poly policy's rate."""
    trainer, batch = tiny_trainer(weight_decay=0.01), tiny_batch()
    assert trainer.optimizer.param_groups[0]["fused"]
    parameters, update = dict(trainer.model.named_parameters()), trainer.optimizer.step
    momenta, expected = {}, {}

    def step():
        for name, p in parameters.items():
            if p.grad is not None:
                d = p.grad + 0.01 * p.detach()
                momenta[name] = 0.9 * momenta[name] + d if name in momenta else d
                expected[name] = p.detach() - trainer.lr * momenta[name]
        update()

    trainer.optimizer.step = step
    for i in range(2):
        trainer.step([batch], i)
        for name, value in expected.items():
            torch.testing.assert_close(parameters[name].detach(), value, rtol=1e-6, atol=1e-7, msg=name)
    assert parameters.keys() - expected.keys() == {n for n in parameters if n.startswith("border_aft_rrbs.0.")}


def test_a_checkpoint_of_another_kind_of_update_continues(tmp_path):
    """Earlier runs used the foreach update, and a momentum may have another memory layout than its weight."""
    first, batch = tiny_trainer(), tiny_batch()
    first.step([batch], 0)
    torch.save(first.state(), tmp_path / "last.pth")
    state = read_file(tmp_path / "last.pth")
    for group in state["optimizer"]["param_groups"]:
        group.update(fused=None, foreach=True)
    for kept in state["optimizer"]["state"].values():
        kept["momentum_buffer"] = kept["momentum_buffer"].contiguous()
    second = tiny_trainer()
    second.load_state(state)
    assert all(group["fused"] and not group["foreach"] for group in second.optimizer.param_groups)
    first.step([batch], 1)
    second.step([batch], 1)
    for (name, p), q in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fp16_skips_a_step_whose_gradients_overflow():
    trainer, batch = tiny_trainer("cuda", amp="fp16"), tiny_batch()
    trainer.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = trainer.model.backbone.layer1[0].conv1.weight.clone()
    trainer.step([batch], 0)
    assert torch.equal(trainer.model.backbone.layer1[0].conv1.weight, before)
    assert trainer.scaler.get_scale() == 2.0**39
    trainer.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**4)
    trainer.step([batch], 1)
    assert not torch.equal(trainer.model.backbone.layer1[0].conv1.weight, before)


# What is not finite


def overflowing(trainer, steps):
    """Makes one gradient infinite in the given steps."""
    number = iter(range(10**6))
    trainer.model.backbone.layer2[0].conv1.weight.register_hook(lambda g: g / 0 if next(number) in steps else g)


def watched_steps(trainer, count, *, position=None, every=1):
    """Trains ``count`` steps and reads the losses after every ``every`` steps. Yields the position after each step."""
    batch = tiny_batch((32, 32))
    position = position or Position()
    watch = LossWatch(trainer, position)
    for i in range(count):
        watch.add(i, trainer.step([batch], i), batch.names)
        if (i + 1) % every == 0:
            watch.read()
        yield position


def test_steps_that_overflow_are_skipped_and_counted():
    trainer = with_scaler(tiny_trainer())
    overflowing(trainer, {1, 2, 4})
    weight, seen = trainer.model.smooth_heads[0].conv.bias, []
    before = weight.detach().clone()
    for position in watched_steps(trainer, 6):
        seen.append((position.skipped_steps, position.skipped_in_a_row, torch.equal(weight, before)))
        before = weight.detach().clone()
    assert seen == [(0, 0, False), (1, 1, True), (2, 2, True), (2, 0, False), (3, 1, True), (3, 0, False)]
    assert trainer.scaler.get_scale() == 2.0**13


@pytest.mark.parametrize("every", [1, 5])
def test_too_many_skipped_in_a_row_stop_the_run_with_a_diagnosis(every):
    trainer = with_scaler(tiny_trainer())
    trainer.amp, trainer.autocast = torch.float16, contextlib.nullcontext  # so that the error advises on fp16
    overflowing(trainer, range(3, 1000))
    position, done = Position(), 0
    with pytest.raises(NonFiniteLoss) as error:
        for _ in watched_steps(trainer, 100, position=position, every=every):
            done += 1
    text = str(error.value)
    assert text.startswith(f"the {MAX_SKIPPED} steps since iteration 4 were all skipped: the loss is ")
    assert f"at iteration {MAX_SKIPPED + 3} those of backbone.layer2.0.conv1.weight (1 of " in text
    assert f"scale of the loss {trainer.scaler.get_scale():g}: lower --lr, or use --amp bf16" in text
    assert done < MAX_SKIPPED + 3 + every
    assert position.skipped_steps == MAX_SKIPPED


def test_a_first_step_that_is_skipped_leaves_no_trace():
    """PyTorch's fused update would start from uninitialised momenta (nan here, by the suite's fixture)."""
    skipping, plain = with_scaler(tiny_trainer()), tiny_trainer()
    overflowing(skipping, {0})
    skipping.step([tiny_batch((32, 32))], 0)
    statistics = {name: buffer.clone() for name, buffer in skipping.model.named_buffers()}
    plain.model.load_state_dict(statistics, strict=False)
    for trainer in (skipping, plain):
        trainer.step([tiny_batch((32, 32))], 1)
    # Scaling by a power of two does not round, so even the momenta are equal bit for bit.
    for (name, p), q in zip(skipping.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_row_goes_on_after_a_resume():
    trainer = with_scaler(tiny_trainer())
    overflowing(trainer, range(1000))
    position = Position(skipped_steps=30, skipped_in_a_row=MAX_SKIPPED - 1)
    with pytest.raises(NonFiniteLoss, match=rf"the {MAX_SKIPPED} steps since iteration "):
        list(watched_steps(trainer, 1, position=position))


@pytest.mark.parametrize("every", [1, 4], ids=["each read", "read later"])
def test_a_gradient_that_is_not_finite_is_an_error_with_iteration_and_parameter(every):
    trainer = tiny_trainer()
    overflowing(trainer, {2})
    expected = (
        r"the loss is \d\.\d+ but gradients are not finite at iteration 3; the images were image 0, image 1, image 2, "
        r"the parameters backbone\.layer2\.0\.conv1\.weight \(1 of \d+\)\. .* learning rate was .*: lower --lr$"
    )
    with pytest.raises(NonFiniteLoss, match=expected):
        list(watched_steps(trainer, 4, every=every))


def test_a_statistic_that_is_not_finite_is_not_saved():
    trainer = tiny_trainer()
    trainer.require_finite_weights(1)
    trainer.model.backbone.bn1.running_var[0] = torch.inf
    with pytest.raises(NonFiniteLoss, match=r"iteration 5: backbone\.bn1\.running_var \(1 of \d+\); .*lower --lr"):
        trainer.require_finite_weights(5)


def test_skipped_steps_are_in_log_metrics_summary_and_checkpoint(tmp_path, few_scenes, monkeypatch, capsys):
    made, run = Trainer.__init__, RunFolder(tmp_path / "run")

    def make(self, *args):
        made(self, *args)
        with_scaler(self)
        overflowing(self, {1} if run.last.exists() else {0})

    monkeypatch.setattr(Trainer, "__init__", make)
    monkeypatch.setattr("dfn_fast.train.__main__.draw", lambda *_: None)
    options = ["synthetic", *SYNTHETIC.split(), "--iterations", "4", "--log-every", "1"]
    main([*options, "--stop-after", "2", "--output-dir", str(run.path)])
    main(["--resume", "--output-dir", str(run.path)])
    assert [record["skipped_steps"] for record in run.metrics() if record["kind"] == "train"] == [1, 1, 1, 2]
    assert read_file(run.last)["position"]["skipped_steps"] == 2
    assert json.loads(run.summary_file.read_text())["skipped_steps"] == 2
    assert "2 steps skipped" in capsys.readouterr().out


def test_fp16_on_a_cpu_skips_and_recovers():
    """Real fp16, which the command line allows only on GPUs: float16 overflows at 65504."""
    trainer = tiny_trainer()
    trainer.amp = trainer.loss.dtype = torch.float16
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    assert [position.skipped_steps for position in watched_steps(trainer, 2)] == [1, 1]
    assert trainer.scaler.get_scale() == 2.0**10
