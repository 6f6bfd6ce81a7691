"""The tables of the README are those of the result files."""

import json

import pytest

from benchmarks import report, scaling


def test_the_readme_shows_the_result_files():
    """Run ``python -m benchmarks.report`` where this fails."""
    assert report.main(["--check"]) == 0


@pytest.fixture
def results(tmp_path):
    """Two days of one machine: the later one has the training step anew."""
    folder = tmp_path / "some-cpu"
    folder.mkdir()
    machine = {"device": "Some CPU", "torch": "2.13", "threads": 2}
    waterfall = {"group": "DFN 1x8x8", "ms": 10.0, "images_per_s": 1.0, "peak_memory_bytes": 10**6, "difference": 0.0}

    def step(ms):
        return [
            {"group": "step", "implementation": "eager"},
            {
                "group": "step",
                "implementation": "ours",
                "ours_ms": ms,
                "images_per_s": 2.0,
                "speed_up_over_eager": 1.25,
                "ours_memory": 60,
                "eager_memory": 100,
            },
        ]

    operators = [
        {"group": name, "implementation": "ours", "median_ms": 1.0, "ratio_to_eager": 0.5, "ratio_to_compile": ratio}
        | {"gb_per_s": 10.0, "share_of_copy": 0.5}
        for name, ratio in (("fast", 0.5), ("slow", 2.0))
    ]
    days = {
        "2026-01-01": {"test_training_step": step(100.0), "test_operators": operators},
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


def test_each_suite_is_its_newest_and_names_its_file(results):
    text = report.text(results)
    assert "### Some CPU, torch 2.13, 2 threads" in text
    assert "| step | 50 | 2.00 | - | 1.25 x | - | 0.60 x | - |" in text
    assert "| step | 100" not in text
    assert "`test_training_step`, from `benchmarks/results/some-cpu/2026-01-02.json`" in text
    assert "`test_operators`, from `benchmarks/results/some-cpu/2026-01-01.json`" in text
    assert "| fused | 10 | 1.00 | 2.00 x | 1 | 1e-05 |" in text


def test_what_is_slower_than_compile_stands_first(results):
    lines = [line for line in report.text(results).splitlines() if line.startswith(("| fast", "| slow"))]
    assert lines[0].startswith("| slow | 1.00 | 2.00 x | 0.50 x |")
    assert lines[1].startswith("| fast | 1.00 | 2.00 x | 2.00 x |")


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
