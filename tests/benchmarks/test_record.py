"""Result files: the parts of a benchmark run that are kept and those that are not."""

import json

import pytest

from benchmarks import record
from benchmarks.reporting.results import with_newer
from dfn_fast.errors import ConfigError


def content(implementations=("eager", "ours"), suite="test_operators", group="add 2x8", **facts):
    """As pytest-benchmark writes it, in part."""
    machine = {"node": "secret-host", "device": "x86_64", "cpu": {"brand_raw": "AMD EPYC"}, "cpus": 2, "torch": "2.13"}
    rows = [
        {
            "group": group,
            "name": f"test_operator[add-{name}]",
            "fullname": f"benchmarks/{suite}.py::test_operator[add-{name}]",
            "params": {"implementation": name},
            "extra_info": {"ratio_to_eager": 0.123456, "bytes_moved": 1234567},
            "stats": {"median": 0.0012345678, "min": 0.001, "rounds": 5, "data": [1, 2, 3]},
        }
        for name in implementations
    ]
    return {"machine_info": machine | facts, "datetime": "2026-01-02T03:04:05", "benchmarks": rows}


def written(tmp_path, **settings):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(content(**settings)))
    (path,) = record.add([file], tmp_path / "results")
    return path, json.loads(path.read_text())


def test_one_file_for_each_machine_and_date(tmp_path):
    path, found = written(tmp_path)
    assert path == tmp_path / "results" / "amd-epyc-2-cpus" / "2026-01-02.json"
    assert found["machine"] == {"device": "AMD EPYC", "cpus": 2, "torch": "2.13"}
    path, found = written(tmp_path, device="NVIDIA H200", driver="1.2")
    assert path == tmp_path / "results" / "nvidia-h200" / "2026-01-02.json"
    assert found["machine"]["device"] == "NVIDIA H200"


def test_figures_are_kept_and_hosts_and_raw_times_are_not(tmp_path):
    path, found = written(tmp_path)
    (eager, ours) = found["suites"]["test_operators"]
    assert ours == {
        "group": "add 2x8",
        "implementation": "ours",
        "median_s": 0.001235,
        "min_s": 0.001,
        "rounds": 5,
        "ratio_to_eager": 0.1235,
        "bytes_moved": 1234567,
    }
    assert eager["implementation"] == "eager"
    assert "secret-host" not in path.read_text()


def test_a_group_replaces_its_rows_and_leaves_others(tmp_path):
    written(tmp_path)
    written(tmp_path, suite="test_inference")
    written(tmp_path, group="attention 2x8")
    _, found = written(tmp_path, implementations=("ours",))
    assert sorted(found["suites"]) == ["test_inference", "test_operators"]
    rows = [(row["group"], row["implementation"]) for row in found["suites"]["test_operators"]]
    assert rows == [("add 2x8", "ours"), ("attention 2x8", "eager"), ("attention 2x8", "ours")]


def test_a_short_start_up_leaves_the_rows_of_a_full_one():
    rows = [{"group": "start-up", "what": what, "seconds": 1.0} for what in ("import", "compile")]
    merged = with_newer(rows, [rows[0] | {"seconds": 2.0}])
    assert [(row["what"], row["seconds"]) for row in merged] == [("import", 2.0), ("compile", 1.0)]


def test_generations_of_one_name_have_folders_of_their_own(tmp_path):
    folders = [written(tmp_path, instructions=name)[0].parent.name for name in ("AVX2", "AVX512")]
    assert folders == ["amd-epyc-avx2-2-cpus", "amd-epyc-avx512-2-cpus"]


@pytest.mark.parametrize("text", ["", "{}", "[1]"])
def test_another_file_is_an_error(tmp_path, text):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"other\.json: expected a file that pytest --benchmark-json wrote"):
        record.add([file], tmp_path)
