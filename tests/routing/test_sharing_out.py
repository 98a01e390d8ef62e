"""How requests are shared out where machines differ, come and go: weights, slow start, keys, late loads."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from routing.balancer import OWN_GAIN, TREND_GAIN, WARM_LEAST, Balancer, Refusal, Want
from routing.options import parse_options
from routing.table import TREND_STEP, RoutingTable
from tests.routing.rows import drop, put, row, table_with


def shares(table: RoutingTable, rounds: int = 4_000, now: float = 0.0, **wants: bytes) -> dict[str, float]:
    """Return the share that each machine gets of requests that end at once."""
    service = table.service("web", 80)
    assert service is not None
    balancer = Balancer(table, "ams", random.Random(11))
    counts: Counter[str] = Counter()
    for _ in range(rounds):
        chosen = balancer.choose(service, now, Want(**wants) if wants else Want())
        assert not isinstance(chosen, Refusal)
        counts[chosen.id] += 1
    return {machine: count / rounds for machine, count in counts.items()}


def placed(table: RoutingTable, key: bytes) -> str:
    (machine,) = shares(table, 1, key=key)
    return machine


def world(count: int, options: dict[str, object] | None = None, **service: int) -> RoutingTable:
    rows = [row("machines", id=f"m{number}") for number in range(count)]
    table = table_with()
    table.load([row("apps"), row("services", options=json.dumps(options or {}), **service), *rows])
    return table


@pytest.mark.parametrize("count", [2, 40])
def test_idle_machines_get_requests_by_weight(count: int) -> None:
    table = world(count)
    for number in range(0, count, 2):
        put(table, "machines", id=f"m{number}", weight=300)
    heavy = sum(share for machine, share in shares(table).items() if not int(machine[1:]) % 2)
    assert 0.70 < heavy < 0.80


def test_loads_and_the_soft_limit_are_seen_by_weight() -> None:
    table = world(2, soft_limit=10)
    put(table, "machines", id="m0", weight=200)
    small, large = table.machine("m1"), table.machine("m0")
    assert small is not None
    assert large is not None
    small.in_flight, large.in_flight = 6, 11
    assert shares(table) == pytest.approx({"m0": 8 / 9, "m1": 1 / 9}, abs=0.03), "5.5 is less than 6"
    small.in_flight = 10
    assert shares(table) == {"m0": 1.0}, "and 11 is below 20"


def test_the_hard_limit_is_the_same_for_all_weights() -> None:
    table = world(2, soft_limit=10, hard_limit=12)
    put(table, "machines", id="m0", weight=200)
    large = table.machine("m0")
    assert large is not None
    large.in_flight = 12
    assert shares(table) == {"m1": 1.0}


def test_the_share_of_a_new_machine_grows() -> None:
    table = world(4, {"slow_start_ms": 10_000})
    assert shares(table, now=100.0)["m0"] == pytest.approx(0.25, abs=0.03), "those that were there are warm"
    put(table, "machines", id="new")
    for at, expected in ((100.0, WARM_LEAST), (105.0, 0.5), (110.0, 1.0), (500.0, 1.0)):
        assert shares(table, now=at)["new"] == pytest.approx(expected / (4 + expected), abs=0.03)


def test_a_machine_that_comes_back_starts_slowly_too() -> None:
    table = world(4, {"slow_start_ms": 10_000})
    put(table, "checks", machine="m0", status="critical")
    assert "m0" not in shares(table, now=50.0)
    put(table, "checks", machine="m0", status="passing")
    assert shares(table, now=50.0)["m0"] < 0.05
    assert shares(table, now=60.0)["m0"] > 0.2


def test_a_lone_machine_needs_no_time_to_get_warm() -> None:
    table = world(0, {"slow_start_ms": 10_000})
    put(table, "machines", id="new")
    assert shares(table) == {"new": 1.0}


def test_a_key_keeps_its_machine_and_keys_are_spread() -> None:
    table = world(10)
    first = {key: placed(table, b"k%d" % key) for key in range(2_000)}
    assert first == {key: placed(table, b"k%d" % key) for key in range(2_000)}
    assert all(140 < count < 260 for count in Counter(first.values()).values())


def test_only_the_keys_of_a_machine_that_dies_move_and_they_come_back() -> None:
    table = world(10)
    before = {key: placed(table, b"k%d" % key) for key in range(1_000)}
    drop(table, "machines", id="m3")
    after = {key: placed(table, b"k%d" % key) for key in range(1_000)}
    moved = {key for key in before if before[key] != after[key]}
    assert moved == {key for key, machine in before.items() if machine == "m3"}
    assert len({after[key] for key in moved}) == 9, "and they are spread over all the others"
    put(table, "machines", id="m3")
    assert before == {key: placed(table, b"k%d" % key) for key in range(1_000)}


def test_a_key_goes_to_the_next_machine_while_its_own_is_full() -> None:
    table = world(10, hard_limit=5)
    own = table.machine(placed(table, b"somebody"))
    assert own is not None
    own.in_flight = 5
    second = placed(table, b"somebody")
    assert second != own.id
    assert second == placed(table, b"somebody")


def test_keys_are_spread_by_weight() -> None:
    table = world(4)
    put(table, "machines", id="m0", weight=300)
    counts = Counter(placed(table, b"k%d" % key) for key in range(2_000))
    assert counts["m0"] / 2_000 == pytest.approx(0.5, abs=0.05)


def test_trends_follow_loads_slowly_and_end() -> None:
    table = table_with(row("machines"))
    machine = table.machine("m1")
    assert machine is not None
    table.set_siblings([("m1", 10)])
    table.follow_loads()
    assert machine.trend == 10, "what was never heard of is as it is first heard"
    table.set_siblings([("m1", 60)])
    table.follow_loads()
    assert machine.trend == round(10 + 50 * TREND_STEP)
    table.set_siblings([("m1", 0)])
    looks = 0
    while machine.trend:
        table.follow_loads()
        looks += 1
    assert 100 < looks < 300
    for _ in range(1_000):
        table.follow_loads()
    assert not table._trends


@pytest.mark.parametrize(
    "sticky",
    [
        5,
        {"cookie": "a", "header": "b"},
        {"set": True},
        {"header": "x", "set": True},
        {"cookie": "a b"},
        {"cookie": "a", "set": 1},
        {"cookie": 5},
        {"cooky": "a"},
    ],
)
def test_a_sticky_that_makes_no_sense_is_refused(sticky: object) -> None:
    with pytest.raises(ValueError, match="sticky"):
        parse_options(json.dumps({"sticky": sticky}))


def test_sticky_is_read() -> None:
    options = parse_options('{"sticky": {"header": "X-User"}}')
    assert options is not None
    assert options.sticky is not None
    assert options.sticky.header == b"x-user"
    assert parse_options('{"sticky": {}}').sticky is None  # type: ignore[union-attr]


def test_more_elsewhere_is_a_reason_for_less_and_not_for_nothing() -> None:
    table = world(2)
    one, other = table.machine("m0"), table.machine("m1")
    assert one is not None
    assert other is not None
    one.trend, other.trend = 10, 12
    assert shares(table)["m0"] == pytest.approx(0.5 + TREND_GAIN * 2 / 22, abs=0.03)
    other.trend = 40
    assert shares(table) == {"m0": 1.0}
    one.trend = other.trend = 10
    other.in_flight = 1
    assert shares(table)["m0"] == pytest.approx(0.5 + OWN_GAIN / 21, abs=0.03)
