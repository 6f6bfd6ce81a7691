"""Counts skipped tests by their reason, so that CI sees a test that no longer runs anywhere.

``tests/known_skips.json`` has for each tier the most tests that may be skipped on a machine without a GPU and without
the real images, by the first words of the reason. Run with ``DFN_COUNT_SKIPS=1`` a session fails if there are more.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

KNOWN = Path(__file__).parents[1] / "known_skips.json"


def tier_of(markers: str) -> str:
    """The tier that a ``-m`` expression selects."""
    return {"not slow": "fast", "slow": "slow"}.get(markers, "all")


def more_than_known(reasons: list[str], known: dict[str, int]) -> list[str]:
    """A sentence for each reason that skipped more tests than ``known`` allows."""
    found: Counter[str] = Counter()
    for reason in reasons:
        reason = reason.removeprefix("Skipped: ")
        found[next((start for start in known if reason.startswith(start)), reason)] += 1
    return [
        f"{count} tests were skipped because {start!r}, expected at most {known.get(start, 0)}; make them run again, "
        f"or write the number in tests/{KNOWN.name}"
        for start, count in found.items()
        if count > known.get(start, 0)
    ]


def fail_if_more_than_known(reporter: Any, known: dict[str, int]) -> None:
    """Makes the session of a pytest terminal reporter fail, with a line for each reason of too many skips."""
    complaints = more_than_known([report.longrepr[2] for report in reporter.stats.get("skipped", [])], known)
    for complaint in complaints:
        reporter.write_line(f"ERROR: {complaint}", red=True)
    if complaints:
        reporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED


def known_skips(tier: str) -> dict[str, int]:
    tiers = json.loads(KNOWN.read_text())
    return dict(Counter(tiers["fast"]) + Counter(tiers["slow"])) if tier == "all" else tiers[tier]
