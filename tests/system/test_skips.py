"""The count of skipped tests, which keeps CI from passing because tests no longer run."""

from types import SimpleNamespace

import pytest

from support.skips import fail_if_more_than_known, known_skips, more_than_known, tier_of

KNOWN = {"needs a GPU": 2, "CamVid is not": 1}


@pytest.mark.parametrize(
    ("reasons", "complaints"),
    [
        ([], []),
        (["Skipped: needs a GPU"] * 2 + ["Skipped: CamVid is not at /data"], []),
        (["Skipped: needs a GPU"] * 3, ["3 tests were skipped because 'needs a GPU', expected at most 2"]),
        (["Skipped: no reason at all"], ["1 tests were skipped because 'no reason at all', expected at most 0"]),
    ],
)
def test_more_skips_than_known_are_named(reasons, complaints):
    found = more_than_known(reasons, KNOWN)
    assert len(found) == len(complaints)
    assert all(text.startswith(expected) for text, expected in zip(found, complaints, strict=True))


def test_both_tiers_together_may_skip_what_each_may():
    fast, slow = known_skips(tier_of("not slow")), known_skips(tier_of("slow"))
    both = known_skips(tier_of(""))
    assert {reason: fast.get(reason, 0) + slow.get(reason, 0) for reason in {**fast, **slow}} == both


def test_a_session_with_too_many_skips_fails(capsys):
    for count, code in ((2, pytest.ExitCode.OK), (3, pytest.ExitCode.TESTS_FAILED)):
        session = SimpleNamespace(exitstatus=pytest.ExitCode.OK)
        skipped = [SimpleNamespace(longrepr=("file", 1, "Skipped: needs a GPU"))] * count
        fail_if_more_than_known(
            SimpleNamespace(_session=session, stats={"skipped": skipped}, write_line=lambda text, red: print(text)),
            KNOWN,
        )
        assert session.exitstatus == code
    assert capsys.readouterr().out.startswith("ERROR: 3 tests were skipped because 'needs a GPU'")
