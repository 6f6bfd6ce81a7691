"""The README's table: what ours gives on one machine, in at most eight rows."""

from pathlib import Path
from typing import Any

from benchmarks.reporting.results import RESULTS, has_gpu, machines, newest, title_of
from benchmarks.reporting.tables import Row, by_group, milliseconds, share, speed_up, table

PLAIN = "float32"  # ReferenceDFN in eager float32
HEADER = ["what", "ms", "vs. plain PyTorch", "vs. torch.compile", "peak memory"]
LEGEND = (
    "Plain PyTorch is `ReferenceDFN` in eager float32, torch.compile the same network compiled; memory is a share of "
    "plain PyTorch's."
)
NO_GPU = "These figures were measured on a CPU; no figure from a GPU exists yet."
MOST = {"training step": 3, "inference": 3, "inference, several scales": 1, "inference, windows": 1}  # rows of a kind


def summary(results: Path = RESULTS) -> list[str]:
    """Markdown: the first machine that has such figures, GPUs first, then the one that was measured last."""
    folders = machines(results)
    for folder in folders:
        machine, suites = newest(folder)
        lines = rows({name: suite["rows"] for name, suite in suites.items()})
        if lines:
            no_gpu = [] if any(map(has_gpu, folders)) else [NO_GPU]
            words = " ".join([f"{title_of(machine)}.", *no_gpu, LEGEND])
            return [*table(HEADER, lines), "", words]
    return [NO_GPU]


def rows(suites: dict[str, list[Row]]) -> list[list[str]]:
    """The first groups of each kind, each network at its fastest precision."""
    lines: list[list[str]] = []
    kinds: dict[str, dict[str, dict[str, Row]]] = {kind: {} for kind in MOST}
    for suite in ("test_training_step", "test_inference"):
        for name, group in by_group(suites.get(suite, [])).items():
            if "ours" not in group:
                continue
            network, _ = name.rsplit(" ", 1)  # without its precision
            best = kinds[_kind(suite, name)]
            if network not in best or group["ours"]["median_ms"] < best[network]["ours"]["median_ms"]:
                best[network] = group
    for kind, networks in kinds.items():
        lines += [_line(kind.split(",")[0], group) for group in list(networks.values())[: MOST[kind]]]
    return lines


def _kind(suite: str, name: str) -> str:
    if suite == "test_training_step":
        return "training step"
    return "inference" + (", several scales" if " scales " in name else ", windows" if " window " in name else "")


def _line(kind: str, group: dict[str, Any]) -> list[str]:
    ours = group["ours"]
    speeds = [speed_up(ours.get(f"speed_up_over_{name}")) for name in (PLAIN, "compile")]
    return [f"{kind}, {ours['group']}", milliseconds(ours), *speeds, share(ours, group.get(PLAIN), "peak_memory_bytes")]
