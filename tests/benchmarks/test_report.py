"""The tables of the README are those of the result files."""

import json

import pytest

from benchmarks import report, scaling
from benchmarks.reporting import plots
from benchmarks.reporting.tables import convolution_table, waterfall_table


def test_the_readme_shows_the_result_files():
    """Run ``python -m benchmarks.report`` where this fails."""
    assert report.main(["--check"]) == 0


@pytest.fixture
def results(tmp_path):
    """Two days of one machine: the later one has the training step anew."""
    folder = tmp_path / "some-cpu"
    folder.mkdir()
    machine = {"device": "Some CPU", "torch": "2.13", "threads": 2}
    waterfall = {
        "group": "DFN 1x8x8",
        "median_ms": 10.0,
        "images_per_s": 1.0,
        "peak_memory_bytes": 10**6,
        "difference": 0.0,
    }

    def step(ms, group="step"):
        return [
            {"group": group, "implementation": "eager", "peak_memory_bytes": 100},
            {
                "group": group,
                "implementation": "ours",
                "median_ms": ms,
                "p20_ms": ms - 10,
                "p80_ms": ms + 10,
                "images_per_s": 2.0,
                "speed_up_over_eager": 1.25,
                "tflop_per_s": 0.1234,
                "share_of_floor": 0.42,
                "peak_memory_bytes": 60,
            },
        ]

    operators = [
        {"group": name, "implementation": "ours", "median_ms": 1.0, "ratio_to_eager": 0.5, "ratio_to_compile": ratio}
        | {"gb_per_s": 10.0, "share_of_copy": 0.5}
        for name, ratio in (("fast", 0.5), ("slow", 2.0))
    ]
    days = {
        "2026-01-01": {"test_training_step": step(100.0) + step(30.0, "wide"), "test_operators": operators},
        "2026-01-02": {
            "test_training_step": step(50.0),
            "waterfall_training": [
                waterfall | {"implementation": "eager", "speed_up": 1.0},
                waterfall | {"implementation": "fused", "speed_up": 2.0, "difference": 1.234e-5},
            ],
        },
    }
    for date, suites in days.items():
        (folder / f"{date}.json").write_text(json.dumps({"date": date, "machine": machine, "suites": suites}))
    return tmp_path


def test_each_group_is_its_newest_and_a_table_names_its_files(results):
    text = report.text(results)
    assert "### Some CPU, torch 2.13, 2 threads" in text
    assert "| step | 50 (40-60) | 2.00 | - | 1.25 x | - | 0.123 | 42% | 0.60 x | - |" in text
    assert "| step | 100" not in text
    assert "| wide | 30 (20-40) |" in text
    first, second = (f"`benchmarks/results/some-cpu/2026-01-0{day}.json`" for day in (1, 2))
    assert f"`test_training_step`, from {first} and {second}\n" in text
    assert f"`test_operators`, from {first}\n" in text
    assert "| fused | 10 | 1.00 | 2.00 x | 1 | 1e-05 |" in text


def test_what_is_slower_than_compile_stands_first_and_is_marked(results):
    lines = [line for line in report.text(results).splitlines() if " fast |" in line or " slow |" in line]
    assert lines[0].startswith("| **slower than compiled:** slow | 1 | 2.00 x | 0.50 x | 10.0 | 50% |")
    assert lines[1].startswith("| fast | 1 | 2.00 x | 2.00 x |")


def row(**figures):
    return {"group": "g", "implementation": "ours", "median_ms": 1.0, **figures}


def test_energy_has_columns_where_it_was_measured():
    rows = [row(peak_memory_bytes=1, speed_up=1.0), row(peak_memory_bytes=1, watts=350.0, joules_per_image=0.5)]
    header, _, first, second = waterfall_table(rows)
    assert header.endswith("| J/image | W | MHz |")
    assert first.endswith("| - | - | - |")
    assert second.endswith("| 0.5 | 350 | - |")


def test_a_line_for_each_convolution():
    rows = [
        row(layer="8-8 3x3", direction="forward", tflop_per_s=0.5, share_of_product=0.5, ours_speed_up=1.5),
        row(layer="8-8 3x3", direction="weight gradient", share_of_product=0.25),
        row(group="21-24", tflop_per_s=2.0),
    ]
    lines = convolution_table(rows)
    assert lines[2] == "| 8-8 3x3 | 0.5 | 50%, ours 1.50 x | - | 25% |"
    assert lines[-1] == "| 21-24 | 1 | 2 | - |"


def test_where_the_time_goes_is_folded(results):
    (results / "some-cpu" / "breakdown_training.txt").write_text("training step, net\nkind  ms\nconvolutions  5.0\n")
    lines = report.text(results).splitlines()
    start = lines.index("<details><summary>where the time goes: training step, net</summary>")
    assert lines[start + 2 : start + 6] == ["```", "kind  ms", "convolutions  5.0", "```"]


def test_a_gpu_stands_first_and_others_are_folded(results):
    folder = results / "a-gpu"
    folder.mkdir()
    machine = {"device": "Some GPU", "torch": "2.11", "threads": 8, "driver": "1"}
    machine |= {"copy_gb_per_s": 4300.0, "product_bfloat16_tflop_per_s": 788.0}
    suites = {"test_startup": [row(what="import", seconds=1.5)]}
    (folder / "2026-01-01.json").write_text(json.dumps({"date": "2026-01-01", "machine": machine, "suites": suites}))
    lines = report.text(results).splitlines()
    assert lines[2] == "### Some GPU, torch 2.11, 8 threads"
    assert "Measured here: a copy moves 4.3e+03 GB/s, a matrix product 788 TFLOP/s bfloat16." in lines
    assert "| import | 1.50 |" in lines
    assert "<details><summary>Some CPU, torch 2.13, 2 threads</summary>" in lines


def test_points_lie_below_the_roofs(tmp_path):
    rows = [
        row(flops=10**9, bytes_moved=10**7, tflop_per_s=0.1),
        row(layer="l", flops=10**8, bytes_moved=10**8, tflop_per_s=0.01),
    ]
    machine = {"copy_gb_per_s": 10.0, "product_float32_tflop_per_s": 0.2}
    (written,) = plots.draw({"test_operators": rows[:1], "test_convolutions": rows[1:]}, tmp_path, machine)
    assert written == tmp_path / "roofline.png"
    assert plots.draw({"test_operators": rows}, tmp_path, {}) == []  # no roof was measured


def test_exponents_are_slopes():
    assert scaling.exponent([1, 2, 4, 8], [3.0, 6.0, 12.0, 24.0]) == pytest.approx(1)
    assert scaling.exponent([1, 4, 16], [5.0, 10.0, 20.0]) == pytest.approx(0.5)


def test_the_readme_is_written_between_its_markers(results, tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "text", lambda: "new tables")
    monkeypatch.setattr(report, "machines", lambda: [results / "some-cpu"])
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    assert readme.read_text() == "before\n\nnew tables\n\nafter\n"
    assert (results / "some-cpu" / "waterfall.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no markers"):
        report.main([])
