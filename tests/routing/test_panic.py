"""Panic: with few machines healthy, the health of all is ignored."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from routing.balancer import ANYWHERE, AT_LIMIT, Balancer, Refusal, Want
from routing.options import parse_options
from tests.routing.rows import put, row, table_with

if TYPE_CHECKING:
    from routing.table import RoutingTable, Service


def world(healthy: int, unhealthy: int, panic_percent: int = 50, **service: int) -> RoutingTable:
    """Return a table with machines h0, h1, … and u0, u1, …."""
    table = table_with(row("services", options=json.dumps({"panic_percent": panic_percent}), **service))
    for number in range(healthy):
        put(table, "machines", id=f"h{number}")
    for number in range(unhealthy):
        put(table, "machines", id=f"u{number}")
        put(table, "checks", machine=f"u{number}", status="critical")
    return table


def service_of(table: RoutingTable) -> Service:
    service = table.service("web", 80)
    assert service is not None
    return service


def shares(
    table: RoutingTable, want: Want = ANYWHERE, rounds: int = 2_000, *, panic: bool = True
) -> Counter[str]:
    """Return how many of so many requests, which end at once, each machine gets."""
    balancer, counts = Balancer(table, "ams", random.Random(5), panic=panic), Counter[str]()
    for _ in range(rounds):
        chosen = balancer.choose(service_of(table), 0.0, want)
        assert not isinstance(chosen, Refusal)
        counts[chosen.id] += 1
    return counts


def test_below_the_threshold_all_machines_get_their_share() -> None:
    counts = shares(world(2, 8))
    assert len(counts) == 10
    assert all(140 < count < 260 for count in counts.values())


@pytest.mark.parametrize(
    ("healthy", "unhealthy", "percent"), [(5, 5, 50), (2, 8, 0), (1, 0, 100), (1, 99, 1)]
)
def test_at_the_threshold_checks_count(healthy: int, unhealthy: int, percent: int) -> None:
    assert all(machine.startswith("h") for machine in shares(world(healthy, unhealthy, percent), rounds=200))


def test_the_threshold_is_of_all_regions_in_reach() -> None:
    table = world(1, 3)
    for number in range(3):
        put(table, "machines", id=f"far{number}", region="gru")
    assert shares(table, rounds=200) == {"h0": 200}, "4 of 7"
    assert "u0" in shares(table, Want(regions=("ams",))), "1 of 4"


def test_machines_that_are_not_started_or_cordoned_do_not_count() -> None:
    table = world(1, 1)
    for number in range(8):
        put(
            table,
            "machines",
            id=f"out{number}",
            cordoned=number % 2,
            state="started" if number % 2 else "stopped",
        )
    assert shares(table, rounds=200) == {"h0": 200}


def test_limits_hold_and_the_nearest_region_comes_first() -> None:
    table = world(1, 3, soft_limit=2, hard_limit=3)
    put(table, "machines", id="far", region="gru")
    put(table, "checks", machine="far", status="critical")
    balancer, service, taken = Balancer(table, "ams", random.Random(1)), service_of(table), []
    for _ in range(15):
        chosen = balancer.choose(service, 0.0)
        assert not isinstance(chosen, Refusal)
        chosen.in_flight += 1
        taken.append(chosen.id)
    assert "far" not in taken[:8]
    assert taken[8:10] == ["far", "far"]
    assert Counter(taken) == dict.fromkeys(("h0", "u0", "u1", "u2", "far"), 3)
    refusal = balancer.choose(service, 0.0)
    assert isinstance(refusal, Refusal)
    assert refusal.code == AT_LIMIT


def test_what_just_failed_here_stays_left_out_while_there_are_others() -> None:
    table = world(1, 3)
    for machine in ("u0", "u1"):
        target = table.machine(machine)
        assert target is not None
        target.ejected_until = 9.0
    assert set(shares(table)) == {"h0", "u2"}
    assert set(shares(table, Want(prefer_instance="u1"))) == {"h0", "u2"}


def test_clients_find_their_machine_again_although_its_checks_fail() -> None:
    table = world(1, 3)
    assert shares(table, Want(prefer_instance="u1"), 50) == {"u1": 50}
    assert len({next(iter(shares(table, Want(key=b"%d" % key), 1))) for key in range(100)}) == 4


def test_a_node_that_never_panics_does_not_do_so_here() -> None:
    assert shares(world(1, 9), rounds=50, panic=False) == {"h0": 50}


def test_explain_says_that_checks_are_ignored() -> None:
    table = world(1, 3)
    balancer = Balancer(table, "ams", random.Random(1))
    told = {target.id: text for target, text in balancer.explain(service_of(table), 0.0)}
    assert "panic, 1 of 4 machines are healthy, less than 50 %" in told["u0"]
    assert "panic" not in told["h0"]
    put(table, "checks", machine="u0", status="passing")
    assert balancer.describe_panic(service_of(table)) == ""


@pytest.mark.parametrize("percent", [-1, 101, "50", 0.5, True])
def test_a_share_that_is_none_is_refused(percent: object) -> None:
    with pytest.raises(ValueError, match="panic_percent"):
        parse_options(json.dumps({"panic_percent": percent}))
