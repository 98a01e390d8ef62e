from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from routing.health import EJECTION_MAX_S, compute_ejection_s, record_failure, record_success
from tests.routing.rows import row, table_with

if TYPE_CHECKING:
    from routing.target import Target


@pytest.fixture
def target() -> Target:
    target = table_with(row("machines")).machine("m1")
    assert target is not None
    return target


def test_each_failure_after_an_ejection_doubles_the_next_up_to_a_bound(target: Target) -> None:
    now, lengths = 100.0, []
    for _ in range(8):
        record_failure(target, now)
        lengths.append(target.ejected_until - now)
        now = target.ejected_until
    assert lengths == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert compute_ejection_s(10**9) == EJECTION_MAX_S


def test_a_burst_of_failures_counts_once(target: Target) -> None:
    for step in range(10):
        record_failure(target, 100.0 + step / 100)
    assert (target.failures, target.ejected_until) == (1, 101.0)


def test_a_success_ends_the_ejection_and_the_row_of_failures(target: Target) -> None:
    record_failure(target, 100.0)
    record_failure(target, 101.0)
    record_success(target)
    assert (target.failures, target.ejected_until) == (0, 0.0)
    record_failure(target, 102.0)
    assert target.ejected_until == 103.0
