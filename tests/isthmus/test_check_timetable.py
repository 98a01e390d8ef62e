from __future__ import annotations

import random

import pytest

from isthmus.checking.timetable import NEW_PER_S, Timetable, compute_delay_s, compute_first_delay_s


def due(timetable: Timetable[str], now: float) -> list[str]:
    found = []
    while (key := timetable.pop_due(now)) is not None:
        found.append(key)
    return found


def test_what_is_due_comes_once_in_order() -> None:
    timetable: Timetable[str] = Timetable()
    for key, at in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
        timetable.put(key, at)
    assert due(timetable, 2.0) == ["a", "b"]
    assert due(timetable, 2.0) == []
    assert (len(timetable), due(timetable, 9.0), len(timetable)) == (1, ["c"], 0)


def test_what_was_taken_out_or_put_anew_does_not_come_at_its_old_time() -> None:
    timetable: Timetable[str] = Timetable()
    timetable.put("a", 1.0)
    timetable.put("b", 1.0)
    timetable.drop("a")
    timetable.put("b", 5.0)
    assert (due(timetable, 4.0), len(timetable)) == ([], 1)
    timetable.put("a", 4.5)
    assert due(timetable, 5.0) == ["a", "b"]


def test_checks_that_begin_together_are_spread() -> None:
    rng = random.Random(7)
    assert compute_first_delay_s(10.0, 1, rng) == 0.0
    delays = [compute_first_delay_s(10.0, 5_000, rng) for _ in range(5_000)]
    busiest = max(sum(second <= delay < second + 1 for delay in delays) for second in range(5))
    assert max(delays) <= 5.0
    assert busiest < 1.1 * NEW_PER_S
    assert max(compute_first_delay_s(0.5, 5_000, rng) for _ in range(100)) <= 0.5


@pytest.mark.parametrize(
    ("interval_s", "in_doubt", "least", "most"),
    [(10.0, False, 9.0, 11.0), (10.0, True, 1.8, 2.2), (0.2, True, 0.09, 0.11)],
)
def test_delay_is_the_interval_with_jitter_and_short_in_doubt(
    interval_s: float, in_doubt: bool, least: float, most: float
) -> None:
    rng = random.Random(7)
    delays = [compute_delay_s(interval_s, rng, in_doubt=in_doubt) for _ in range(1_000)]
    assert least <= min(delays) < max(delays) <= most
    assert max(delays) - min(delays) > 0.9 * (most - least)
