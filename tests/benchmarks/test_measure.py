"""The benchmarks measure correctly: memory, turns, wrong results, and candidates of the search."""

from typing import NamedTuple

import pytest
import torch

from benchmarks import search_blocks
from benchmarks.harness import measure


def test_memory_counts_what_lives_at_one_time():
    x = torch.ones(1 << 18, device=measure.DEVICE)  # 1 MiB

    def call() -> torch.Tensor:
        doubled = x * 2
        total = doubled + x  # with doubled: 2 MiB
        del doubled
        return total * 2  # again 2 MiB

    assert measure.peak_memory(call) == pytest.approx(2 << 20, rel=1e-3)
    assert measure.held_memory(call) == pytest.approx(1 << 20, rel=1e-3)  # the result


def test_implementations_take_turns():
    if measure.DEVICE.type == "cuda":
        pytest.skip("on CUDA calls are only enqueued; the order is that of the CPU's loop")
    order: list[str] = []
    seconds = measure.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(s) for name, s in seconds.items()} == {"a": 3, "b": 3}


def case(ours, labels: bool = False):
    def reference(x, y):
        return (x > y).to(torch.uint8) if labels else x * y

    return measure.Case(
        "op",
        "8x8",
        reference,
        ours,
        lambda: [torch.randn(8, 8), torch.randn(8, 8)],
        forward_bytes=lambda x, y: x.nbytes + y.nbytes,
        forward_flops=lambda x, y: x.numel(),
        backward_bytes=lambda x, y: x.nbytes,
    )


def test_a_wrong_result_is_not_timed():
    measure.Trial(case(lambda x, y: x * y), True).check("ours")
    with pytest.raises(AssertionError, match="op 8x8, ours, result 0: differs from eager"):
        measure.Trial(case(lambda x, y: x * y * 1.01), False).check("ours")
    wrong_gradient = case(lambda x, y: x * y.detach() + 0 * y)
    measure.Trial(wrong_gradient, False).check("ours")
    with pytest.raises(AssertionError, match="result 2: differs from eager"):
        measure.Trial(wrong_gradient, True).check("ours")
    with pytest.raises(AssertionError, match="of the labels differ"):
        measure.Trial(case(lambda x, y: (x > -y).to(torch.uint8), labels=True), False).check("ours")


def test_bytes_and_operations_of_backward_count_only_where_it_runs():
    trials = [measure.Trial(case(torch.mul), backward) for backward in (False, True)]
    assert [trial.bytes_moved() for trial in trials] == [512, 768]
    assert [trial.flops() for trial in trials] == [64, 192]


@pytest.mark.parametrize(
    ("device", "amx", "expected"), [("cpu", False, "off"), ("cpu", True, "bf16"), ("cuda", False, "bf16")]
)
def test_the_default_precision_is_that_of_training(monkeypatch, device, amx, expected):
    monkeypatch.setattr(measure, "DEVICE", torch.device(device))
    monkeypatch.setattr("dfn_fast.runtime.device.has_amx", lambda: amx)
    monkeypatch.setattr("dfn_fast.runtime.device.onednn_takes_bf16", lambda: True)
    assert measure.default_amp() == expected


class Tile(NamedTuple):
    pixels: int
    channels: int
    num_warps: int


def test_the_search_tries_each_neighbour_once():
    tiles = list(search_blocks.neighbours(Tile(8, 1, 16)))
    assert len(tiles) == len(set(tiles))
    assert set(tiles) == {
        Tile(16, 1, 16), Tile(4, 1, 16), Tile(8, 2, 16), Tile(8, 1, 8), Tile(16, 1, 8), Tile(4, 2, 16), Tile(8, 2, 8),
    }  # fmt: skip  # no channel halved, no warp more


def test_the_search_finds_the_faster_tile_and_leaves_out_wrong_ones(monkeypatch):
    from dfn_kernels import tuning

    monkeypatch.setattr(tuning, "TABLE", {"small": {32: Tile(8, 8, 4)}, "large": {32: Tile(8, 8, 4)}}, raising=False)
    path = ("TABLE", "small", 32)

    def ours(x, y):
        tile = tuning.TABLE["small"][32]
        if tile.num_warps == 8:
            raise RuntimeError("too many warps")
        return x * y + (1.0 if tile.channels < 8 else 0.0)

    seen: list[float] = []
    trial = measure.Trial(case(ours), False)
    run = trial.run

    def timed_run(implementation):
        """The more pixels the faster, up to 32, and a wrong tile is the fastest of all."""
        tile = tuning.TABLE["small"][32]
        seen.append(abs(tile.pixels - 32) + 1.0 if tile.channels >= 8 else 0.1)
        return run(implementation)

    def times(functions, rounds):
        seconds = {}
        for name, function in functions.items():
            function()
            seconds[name] = [seen.pop()] * rounds
        return seconds

    monkeypatch.setattr(trial, "run", timed_run)
    monkeypatch.setattr(measure, "alternate", times)
    assert search_blocks.users([path, ("TABLE", "large", 32)], [(trial.case, False)]) == {
        path: [(trial.case, False)],
        ("TABLE", "large", 32): [],
    }
    monkeypatch.setattr(measure, "Trial", lambda case, backward: trial)
    found = search_blocks.Search(path, [(trial.case, False)], Tile(8, 8, 4))
    steps = []
    for number in search_blocks.search([found], steps=4, rounds=12):
        steps.append((number, found.best.pixels))
    assert found.best == Tile(32, 8, 4)
    assert steps == [(1, 16), (2, 32), (3, 32)]  # the last one wins nothing
    assert found.candidates() == []
    assert tuning.TABLE["small"][32] == Tile(8, 8, 4)
