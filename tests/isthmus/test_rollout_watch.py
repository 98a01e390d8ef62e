"""When a node fares badly: by its own measure from before, of enough requests, and by deaths of workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from isthmus.rollouts.watch import REQUESTS_MIN, Watch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from replication.metrics import Sample


class Counted:
    """What the workers of a node have counted."""

    def __init__(self) -> None:
        self.deaths = 0
        self.checked: dict[str, bool] = {}
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def add(self, status: str = "2xx", times: int = 1, app: str = "web") -> Counted:
        self._add("isthmus_requests_total", (("app", app), ("status", status)), times)
        return self

    def add_errors(self, times: int, code: str = "no-machine", **labels: str) -> Counted:
        self._add("isthmus_errors_total", (*labels.items(), ("code", code)), times)
        return self

    def _add(self, name: str, labels: tuple[tuple[str, str], ...], times: int) -> None:
        self.values[name, labels] = self.values.get((name, labels), 0.0) + times

    def samples(self) -> Iterator[Sample]:
        yield "isthmus_feed_followers", (), 1_000.0
        for (name, labels), value in self.values.items():
            yield name, labels, value

    def watch(self) -> Watch:
        return Watch(self.samples, lambda: self.deaths, lambda: dict(self.checked))


@pytest.fixture
def counted() -> Counted:
    return Counted()


def test_node_of_which_nothing_is_asked_fares_well(counted: Counted) -> None:
    watch = counted.watch()
    assert (watch.find_problem(), watch.describe()) == ("", "0 requests, 0 failed")


def test_requests_before_and_their_failures_are_not_counted(counted: Counted) -> None:
    counted.add("5xx", 100)
    watch = counted.watch()
    counted.add(times=30)
    assert (watch.find_problem(), watch.describe()) == ("", "30 requests, 0 failed")


def test_failures_are_told_with_what_was_before(counted: Counted) -> None:
    counted.add(times=98).add("5xx", 2)
    watch = counted.watch()
    counted.add(times=30).add("5xx", 10)
    assert watch.find_problem() == "25% of 40 requests were answered with 5xx, 2% before"
    assert watch.describe() == "40 requests, 10 of them failed"


def test_few_requests_say_nothing(counted: Counted) -> None:
    watch = counted.watch()
    counted.add("5xx", REQUESTS_MIN - 1)
    assert watch.find_problem() == ""
    counted.add("5xx")
    assert watch.find_problem() != ""


@pytest.mark.parametrize(("before", "bound"), [(0, 5), (10, 25), (40, 85)])
def test_share_of_failures_may_be_twice_what_it_was_and_a_little_more(
    counted: Counted, before: int, bound: int
) -> None:
    counted.add(times=100 - before).add("5xx", before)
    watch = counted.watch()
    counted.add(times=1_000 - bound * 10).add("5xx", bound * 10)
    assert watch.find_problem() == ""
    counted.add("5xx", 20)
    assert watch.find_problem() != ""


def test_node_that_failed_as_often_before_is_not_blamed(counted: Counted) -> None:
    counted.add(times=50).add("5xx", 50)
    watch = counted.watch()
    counted.add(times=50).add("5xx", 50)
    assert watch.find_problem() == ""


def test_answers_of_the_proxy_itself_are_failures_whatever_their_status(counted: Counted) -> None:
    counted.add(times=100)
    watch = counted.watch()
    counted.add(times=30).add("4xx", 10).add_errors(10, app="web")
    assert watch.find_problem() == "25% of 40 requests were answered by the proxy itself, 0% before"


def test_answers_of_no_app_are_requests_of_their_own(counted: Counted) -> None:
    counted.add(times=100)
    watch = counted.watch()
    counted.add_errors(REQUESTS_MIN, code="no-app")
    assert watch.find_problem() == "100% of 20 requests were answered by the proxy itself, 0% before"
    assert watch.describe().startswith("20 requests")


def test_client_errors_of_apps_are_not_failures(counted: Counted) -> None:
    watch = counted.watch()
    counted.add("4xx", 100)
    assert watch.find_problem() == ""


def test_apps_are_counted_together(counted: Counted) -> None:
    watch = counted.watch()
    counted.add("5xx", 10, "one").add("5xx", 10, "two")
    assert watch.find_problem() == "100% of 20 requests were answered with 5xx, 0% before"


def test_death_of_a_worker_is_a_problem_however_few_requests_there_were(counted: Counted) -> None:
    counted.deaths = 3
    watch = counted.watch()
    assert watch.find_problem() == ""
    counted.deaths = 4
    assert watch.find_problem() == "a worker died"


def test_workers_that_are_not_heard_of_yet_are_no_problem(counted: Counted) -> None:
    counted.add(times=90).add("5xx", 10)
    watch = counted.watch()
    counted.values.clear()
    assert watch.find_problem() == ""


@pytest.mark.parametrize(
    ("before", "now", "problem"),
    [
        ({"a": True}, {"a": False}, "1 of 1 machines that passed their checks fail them: a"),
        (
            {"a": True, "b": True, "c": True},
            {"a": True, "b": False, "c": False},
            "2 of 3 machines that passed their checks fail them: b",
        ),
        ({"a": True, "b": True}, {"a": True, "b": False}, ""),
        ({"a": False}, {"a": False}, ""),  # it had no part in that
        ({"a": True, "b": True}, {"b": True, "new": False}, ""),  # one was stopped, one is new
        ({}, {}, ""),
    ],
)
def test_most_machines_that_passed_their_checks_must_go_on_to(
    counted: Counted, before: dict[str, bool], now: dict[str, bool], problem: str
) -> None:
    counted.checked = before
    watch = counted.watch()
    assert watch.find_problem() == ""
    counted.checked = now
    assert watch.find_problem() == problem
