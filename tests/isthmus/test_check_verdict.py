from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.checking.verdict import FALLS_FREE, SUCCESSES_NEEDED_MAX, Verdict, compute_successes_needed

SIGNS = {"passing": "p", "warning": "w", "critical": "c", None: "?"}


def run(results: str, failures: int = 1, successes: int = 1, step_s: float = 1.0) -> str:
    """The status after each result: + passed, - failed; an interval is a second."""
    verdict = Verdict(failures, successes, 1.0)
    told = ""
    for i, result in enumerate(results):
        verdict.handle_result(passed=result == "+", now=i * step_s)
        assert verdict.status is not None
        told += SIGNS[verdict.status.value]
    return told


@pytest.mark.parametrize(
    ("failures", "successes", "results", "told"),
    [
        (1, 1, "+", "p"),
        (3, 3, "+", "p"),
        (3, 3, "-", "c"),
        (1, 1, "+-+-", "pcpc"),
        (2, 1, "+-+--", "ppppc"),
        (3, 1, "+--+---", "ppppppc"),
        (2, 2, "+--+-++", "ppccccp"),
        (1, 3, "-++-+++", "ccccccp"),
    ],
)
def test_status_follows_results_in_a_row(failures: int, successes: int, results: str, told: str) -> None:
    assert run(results, failures, successes) == told


def test_the_third_fall_of_late_takes_more_successes_and_shows_as_a_warning() -> None:
    # Two falls are free; after the third it takes two in a row, after the fourth four.
    assert run("+-+-+-++") == "pcpcpccw"
    assert run("+-+-+-++-++++") == "pcpcpccwccccw"


def test_falls_are_forgotten_and_the_warning_with_them() -> None:
    told = run("+-+-+-++" + "+" * 60)
    assert told.startswith("pcpcpccw")
    assert told[-1] == "p"
    assert run("+-+-+-+", step_s=60.0) == "pcpcpcp"


def test_one_failure_raises_doubt_until_it_is_settled() -> None:
    verdict = Verdict(2, 2, 1.0)
    doubts = []
    for passed in (True, False, True, False, False, True):
        verdict.handle_result(passed=passed, now=0.0)
        doubts.append(verdict.is_in_doubt)
    assert doubts == [False, True, False, True, False, False]


@pytest.mark.parametrize(
    ("successes", "falls", "needed"),
    [(1, 0, 1), (1, 2, 1), (1, 3, 2), (2, 4, 8), (1, 16, 30), (100, 16, 100)],
)
def test_needed_successes_double_with_each_fall(successes: int, falls: int, needed: int) -> None:
    assert compute_successes_needed(successes, falls) == needed


@given(st.lists(st.booleans(), max_size=200), st.integers(1, 4), st.integers(1, 4))
def test_changes_are_never_more_frequent_than_the_thresholds_allow(
    results: list[bool], failures: int, successes: int
) -> None:
    verdict = Verdict(failures, successes, 1.0)
    falls = 0
    for i, passed in enumerate(results):
        was = verdict.status
        if verdict.handle_result(passed=passed, now=float(i)) and was is not None:
            streak = results[max(0, i - (successes if passed else failures) + 1) : i + 1]
            if {was.value, verdict.status and verdict.status.value} != {"passing", "warning"}:
                assert set(streak) == {passed}
                falls += not passed
    assert falls * failures <= len(results)
    assert verdict.successes_needed() <= max(successes, SUCCESSES_NEEDED_MAX)
    assert verdict.is_flapping() is False or falls > FALLS_FREE
