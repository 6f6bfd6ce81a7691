"""Result files: one JSON for each machine and date under ``benchmarks/results/``.

They keep the machine's facts and each row's figures, but no host names, paths or raw times.
"""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import ceilings, environment
from dfn_fast.files import write_text

RESULTS = Path(__file__).parents[1] / "results"
FACTS = (
    *("device", "python", "torch", "triton", "threads", "cpus", "instructions", "kernels"),
    *("cuda", "driver", "power_limit_watts", "sm_clock_max_mhz"),
    *("copy_gb_per_s", "product_float32_tflop_per_s", "product_bfloat16_tflop_per_s", "product_float16_tflop_per_s"),
)
TIMES = ("median", "min", "rounds")  # of pytest-benchmark, seconds; everything else is in extra_info


def suite_of(benchmark: dict[str, Any]) -> str:
    """``test_operators`` of ``benchmarks/test_operators.py::test_operator[...]``."""
    return Path(benchmark["fullname"].split("::")[0]).stem


def compact(content: dict[str, Any]) -> tuple[dict[str, Any], str, dict[str, list[dict[str, Any]]]]:
    """The machine's facts, the date, and the rows of each suite, from a file of pytest-benchmark."""
    facts = content["machine_info"]
    machine = {name: rounded(facts[name]) for name in FACTS if name in facts}
    if "driver" not in machine:
        machine["device"] = facts["cpu"]["brand_raw"]
    suites: dict[str, list[dict[str, Any]]] = {}
    for benchmark in content["benchmarks"]:
        times = {f"{name}_s" if name != "rounds" else name: benchmark["stats"][name] for name in TIMES}
        figures = {k: rounded(v) for k, v in (times | benchmark["extra_info"]).items()}
        row = {"group": benchmark["group"], "implementation": implementation_of(benchmark), **figures}
        suites.setdefault(suite_of(benchmark), []).append(row)
    return machine, content["datetime"][:10], suites


def machine_facts() -> dict[str, Any]:
    """The facts of this machine, for figures that pytest-benchmark did not take."""
    import cpuinfo  # comes with pytest-benchmark

    facts = environment() | ceilings()
    if "driver" not in facts:
        facts["device"] = cpuinfo.get_cpu_info()["brand_raw"]
    return {name: rounded(facts[name]) for name in FACTS if name in facts}


def implementation_of(benchmark: dict[str, Any]) -> str:
    return (benchmark.get("params") or {}).get("implementation", benchmark["name"])


def rounded(value: Any) -> Any:
    """A number to four digits: the spread of times does not support more."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def machine_name(machine: dict[str, Any]) -> str:
    """The name of a machine's folder: ``amd-epyc-avx2-2-cpus``, ``nvidia-h200``."""
    name = machine["device"]
    if "driver" not in machine:  # some makers give every generation of a CPU one name
        name += f" {machine.get('instructions', '')} {machine['cpus']} cpus"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def merge(machine: dict[str, Any], date: str, suites: dict[str, list[dict[str, Any]]], results: Path = RESULTS) -> Path:
    """Puts suites into the result file of a machine and date, each group in place of its former rows; returns the
    file."""
    path = results / machine_name(machine) / f"{date}.json"
    content = json.loads(path.read_text()) if path.exists() else {"date": date, "machine": machine, "suites": {}}
    content["machine"] |= machine
    for suite, rows in suites.items():
        content["suites"][suite] = with_newer(content["suites"].get(suite, []), rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def with_newer(rows: list[dict[str, Any]], newer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a suite after another run of it, perhaps in part: a group that ran again has only its new rows, in
    its former place. Start-up is one group; each ``what`` of it is replaced by itself."""

    def by_group(of: list[dict[str, Any]]) -> dict[tuple[str, str | None], list[dict[str, Any]]]:
        groups: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
        for row in of:
            groups.setdefault((row["group"], row.get("what")), []).append(row)
        return groups

    return [row for group in (by_group(rows) | by_group(newer)).values() for row in group]


def machines(results: Path = RESULTS) -> list[Path]:
    """The folders of result files, one for each machine: GPUs first, then the machine that was measured last."""

    def rank(folder: Path) -> tuple[bool, str]:
        return has_gpu(folder), max(path.stem for path in folder.glob("*.json"))

    return sorted(sorted({path.parent for path in results.glob("*/*.json")}), key=rank, reverse=True)


def has_gpu(folder: Path) -> bool:
    """Whether the machine of a folder computed on a GPU."""
    return "driver" in newest(folder)[0]


def newest(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A machine's facts, and for each suite the newest ``rows`` of each group, with the ``files`` they are from."""
    machine: dict[str, Any] = {}
    suites: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        machine |= content["machine"]
        for name, rows in content["suites"].items():
            fresh = [row | {"file": path.name} for row in rows]
            suites[name] = {"rows": with_newer(suites[name]["rows"] if name in suites else [], fresh)}
    for suite in suites.values():
        suite["files"] = sorted({row["file"] for row in suite["rows"]})
    return machine, suites


def title_of(machine: dict[str, Any]) -> str:
    """A machine in words. Some makers give every generation of a CPU one name, so its instructions stand beside it."""
    of = "" if "driver" in machine or "instructions" not in machine else f" ({machine['instructions']})"
    return f"{machine['device']}{of}, torch {machine['torch']}, {machine['threads']} threads"
