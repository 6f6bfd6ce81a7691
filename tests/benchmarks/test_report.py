"""RESULTS.md and the README's table match the result files."""

import json

import pytest

from benchmarks import report, scaling
from benchmarks.reporting import plots
from benchmarks.reporting.summary import NO_GPU, summary
from benchmarks.reporting.tables import convolution_table, inference_table, waterfall_table


def test_both_pages_show_the_result_files():
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
    assert "\n## Some CPU, torch 2.13, 2 threads\n" in text
    assert "| step | 50 (40-60) | 2.00 | - | 1.25 x | - | 0.123 | 42% | 0.60 x | - |" in text
    assert "| step | 100" not in text
    assert "| wide | 30 (20-40) |" in text
    first, second = (f"`results/some-cpu/2026-01-0{day}.json`" for day in (1, 2))
    assert f"`test_training_step`, from {first} and {second}\n" in text
    assert f"`test_operators`, from {first}\n" in text
    assert "| fused | 10 | 1.00 | 2.00 x | 1 | 1e-05 |" in text


def test_what_is_slower_than_compile_stands_first_and_is_marked(results):
    lines = [line for line in report.text(results).splitlines() if " fast |" in line or " slow |" in line]
    assert lines[0].startswith("| **slower than compiled:** slow | 1 | 2.00 x | **0.50 x, slower** | 10.0 | 50% |")
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
    facts = {"device": "Some GPU", "torch": "2.11", "threads": 8, "driver": "1"}
    facts |= {"copy_gb_per_s": 4300.0, "product_bfloat16_tflop_per_s": 788.0}
    machine(results, "a-gpu", facts=facts, test_startup=[row(what="import", seconds=1.5)])
    lines = report.text(results).splitlines()
    assert next(line for line in lines if line.startswith("## ")) == "## Some GPU, torch 2.11, 8 threads"
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


def test_the_readme_is_written_between_its_markers(results, tmp_path, monkeypatch, capsys):
    readme, page = tmp_path / "README.md", tmp_path / "RESULTS.md"
    readme.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "text", lambda: "all tables")
    monkeypatch.setattr(report, "summary", lambda: ["short", "table"])
    monkeypatch.setattr(report, "machines", lambda: [results / "some-cpu"])
    assert report.main(["--check"]) == 1
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["README.md", "RESULTS.md"]
    assert report.main([]) == 0
    assert readme.read_text() == f"before\n\n{report.BEGIN}\n\nshort\ntable\n\n{report.END}\n\nafter\n"
    assert page.read_text() == "all tables"
    assert (results / "some-cpu" / "waterfall.png").read_bytes().startswith(b"\x89PNG")
    assert report.main(["--check"]) == 0
    for path in (readme, page):  # each of the two is checked
        text = path.read_text()
        path.write_text(text.replace("table", "tab1e"))
        assert report.main(["--check"]) == 1
        assert capsys.readouterr().err.split()[0] == path.name
        path.write_text(text)
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="no markers"):
        report.main([])


def trial(group, ms, memory=60, **speed_ups):
    """The rows of one trial: the plain network and ours."""
    ours = row(group=group, median_ms=ms, peak_memory_bytes=memory)
    ours |= {f"speed_up_over_{name}": value for name, value in speed_ups.items()}
    return [{"group": group, "implementation": "float32", "peak_memory_bytes": 100}, ours]


def machine(root, name, date="2026-01-01", facts=None, **suites):
    """A folder of results with one file."""
    (root / name).mkdir()
    machine = {"device": name, "torch": "2.13", "threads": 2} | (facts or {})
    (root / name / f"{date}.json").write_text(json.dumps({"date": date, "machine": machine, "suites": suites}))


def test_the_summary_has_a_row_for_each_kind(tmp_path):
    inference = [
        *trial("R 1x8x8 float32", 10.0, float32=1.5, compile=1.25),
        *trial("R 1x8x8 5 scales flip float32", 20.0, 141, float32=2.0),
        *trial("R 1x8x8 window 4 float32", 30.0, float32=0.994, compile=0.5),
    ]
    machine(
        tmp_path, "cpu", test_training_step=trial("R 2x8x8 float32", 40.0, 100, float32=1.0), test_inference=inference
    )
    header, _, *rows, _, words = summary(tmp_path)
    assert header == "| what | ms | vs. plain PyTorch | vs. torch.compile | peak memory |"
    assert rows == [
        "| training step, R 2x8x8 float32 | 40 | 1.00 x | - | 1.00 x |",
        "| inference, R 1x8x8 float32 | 10 | 1.50 x | 1.25 x | 0.60 x |",
        "| inference, R 1x8x8 5 scales flip float32 | 20 | 2.00 x | - | **1.41 x, more** |",
        "| inference, R 1x8x8 window 4 float32 | 30 | **0.99 x, slower** | **0.50 x, slower** | 0.60 x |",
    ]
    assert words.startswith(f"cpu, torch 2.13, 2 threads. {NO_GPU} ")


def test_the_summary_takes_the_faster_precision(tmp_path):
    steps = [*trial("R 2x8x8 float32", 10.0), *trial("R 2x8x8 bf16", 20.0), *trial("S 2x8x8 float32", 9.0)]
    machine(tmp_path, "cpu", test_training_step=[*steps, *trial("S 2x8x8 bf16", 8.0)])
    rows = [line.split(" | ")[0] for line in summary(tmp_path) if line.startswith("| training")]
    assert rows == ["| training step, R 2x8x8 float32", "| training step, S 2x8x8 bf16"]


def test_the_summary_has_at_most_eight_rows(tmp_path):
    how = ["", "5 scales flip ", "window 4 "]
    inference = [rows for i in range(5) for way in how for rows in trial(f"R {i}x8x8 {way}float32", 1.0)]
    steps = [rows for i in range(5) for rows in trial(f"R {i}x8x8 float32", 1.0)]
    machine(tmp_path, "cpu", test_training_step=steps, test_inference=inference)
    assert len([line for line in summary(tmp_path) if " R " in line]) == 8


def test_the_summary_takes_a_gpu_or_the_newest_machine(tmp_path):
    def first(root):
        return next(line for line in summary(root) if "threads" in line).split(",")[0]

    machine(tmp_path, "b-older", "2026-01-01", test_training_step=trial("R 2x8x8 float32", 1.0))
    machine(tmp_path, "a-newer", "2026-01-02", test_training_step=trial("R 2x8x8 float32", 1.0))
    machine(tmp_path, "newest", "2026-01-03", test_startup=[row(what="import", seconds=1.0)])  # no speed to show
    assert first(tmp_path) == "a-newer"
    machine(tmp_path, "gpu", "2025-01-01", {"driver": "1"}, test_training_step=trial("R 2x8x8 float32", 1.0))
    assert first(tmp_path) == "gpu"
    assert NO_GPU not in "\n".join(summary(tmp_path))


def test_no_results_are_said_to_be_none(tmp_path):
    assert summary(tmp_path) == [NO_GPU]


def test_a_slower_row_says_so_in_every_table():
    rows = [row(implementation="plain", peak_memory_bytes=1, speed_up=1.0), row(peak_memory_bytes=1, speed_up=0.6)]
    assert [line.split(" | ")[3] for line in waterfall_table(rows)[2:]] == ["1.00 x", "**0.60 x, slower**"]
    line = inference_table(trial("R", 1.0, 128, float32=0.5, compile=1.1))[2]
    assert line == "| R | 1 | - | **0.50 x, slower** | - | 1.10 x | - | - | **1.28 x, more** |"
