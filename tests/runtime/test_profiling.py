"""A profile of training steps: its trace and its tables."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from dfn_fast.runtime.profiling import StepProfiler, kind_of, report
from support.steps import tiny_batch, tiny_trainer
from support.tiny_resnet import tiny_backbones


def profiled(trainer, folder, steps=8, regions=True, epoch=8):
    text = []
    profiler = StepProfiler(folder, torch.device("cpu"), regions, text.append)
    batch = tiny_batch((32, 32))
    for i in range(steps):
        profiler.before(epoch - i % epoch, epoch)
        trainer.step([batch], i)
        profiler.after((i + 1) % epoch == 0)
    profiler.close()
    return "\n".join(text)


class Nothing:
    """A trainer whose steps do next to nothing."""

    def step(self, batches, iteration):
        torch.ones(3).sum()


def rows(text, title):
    """The table under ``title`` as name -> milliseconds and share."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.startswith(title + " "))
    found = {}
    for line in lines:
        if not line or line.startswith("trace:"):
            break
        *_, ms, share = line.split()
        found[line[: line.index("  ")]] = float(ms), float(share.rstrip("%"))
    return found


def test_a_profile_is_a_trace_and_two_tables(tmp_path):
    text = profiled(tiny_trainer(), tmp_path)
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"dfn: backbone stem", "dfn: smooth head 1/4", "dfn: losses", "dfn: backward", "dfn: optimizer"} <= names
    regions, kinds = rows(text, "region"), rows(text, "kind")
    for name in ("backbone stage 1/32", "smooth stage 1/4", "border stage 1/8", "border head 2", "losses", "optimizer"):
        assert regions[name][0] > 0
    assert kinds["convolutions"][0] > 0
    assert kinds["operator dfn_kernels::upsample_cross_entropy"][0] > 0
    for shares in (regions, kinds):
        assert sum(share for _, share in shares.values()) == pytest.approx(100, abs=2)
    # The backward pass of each part is counted with the part, so little is left over.
    assert regions["backward"][0] < 0.2 * sum(ms for ms, _ in regions.values())


@pytest.mark.slow
def test_without_regions_the_kinds_are_left(tmp_path):
    with tiny_backbones():  # less to trace
        trainer = tiny_trainer(parts={"border": False})
    trainer.loss = torch.compile(trainer.loss, fullgraph=True, backend="eager")
    text = profiled(trainer, tmp_path, regions=False)
    assert "--no-compile" in text
    assert "\nregion " not in text
    assert rows(text, "kind")["convolutions"][0] > 0


def test_a_run_too_short_to_profile_says_so(tmp_path):
    assert "the run ended after 3 steps" in profiled(Nothing(), tmp_path, steps=3)
    assert not list(tmp_path.iterdir())


def test_an_epoch_shorter_than_the_profile_ends_it(tmp_path):
    assert "profile of 2 steps" in profiled(Nothing(), tmp_path, epoch=2)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["aten::mkldnn_convolution", "aten::conv2d", "dfn: losses"], "convolutions"),
        (["aten::mul", "dfn_kernels::upsample_add"], "operator dfn_kernels::upsample_add"),
        (["aten::copy_", "Optimizer.step#SGD.step"], "optimizer"),
        (["sm90_xmma_dgrad_implicit_gemm_f16"], "convolutions"),
        (["triton_red_fused_native_batch_norm"], "generated code"),
        (["nvjet_hsh_128x256"], "matrix products"),
        (["CompiledFunction"], "generated code"),
        (["aten::add"], "other operations"),
        (["upsample_add_fwd_kernel"], "kernel upsample_add_fwd_kernel"),
        (["Memcpy HtoD (Pinned -> Device)"], "copies and casts"),
    ],
)
def test_kinds(names, kind):
    assert kind_of(names) == kind


def event(name, start, own, parent=None, kernels=(), device=DeviceType.CPU, sequence_nr=-1):
    return SimpleNamespace(
        name=name,
        cpu_parent=parent,
        sequence_nr=sequence_nr,
        device_type=device,
        time_range=SimpleNamespace(start=start, elapsed_us=lambda: own),
        self_device_time_total=own,
        self_cpu_time_total=0,
        kernels=[SimpleNamespace(name=n, duration=t) for n, t in kernels],
    )


def test_device_time_is_that_of_kernels_linked_or_not():
    """As on CUDA: the kernels of an operation, of its derivative on another thread, and of a graph replay."""
    part = event("dfn: losses", 0, 0)
    forward = event("aten::convolution", 1, 2000, part, [("fprop", 2000)], sequence_nr=5)
    node = event("autograd::engine::evaluate_function: ConvolutionBackward0", 9, 0, sequence_nr=5)
    backward = event("aten::convolution_backward", 10, 4000, node, [("wgrad", 4000)])
    kernels = [event(n, 0, t, device=DeviceType.CUDA) for n, t in (("fprop", 2000), ("wgrad", 4000), ("gemm", 1000))]
    text = report([part, forward, node, backward, *kernels], 1, 0.01, "cuda", True)
    assert rows(text, "region") == {
        "losses": (6.0, 60.0),
        "kernels that no operation launched": (1.0, 10.0),
        "not attributed": (3.0, 30.0),
    }
    assert rows(text, "kind") == {
        "convolutions": (6.0, 60.0),
        "matrix products": (1.0, 10.0),
        "host code and the rest": (0.0, 0.0),
        "not attributed": (3.0, 30.0),
    }
