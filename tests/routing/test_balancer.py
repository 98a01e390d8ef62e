from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from routing.balancer import ANYWHERE, FALLEN_COUNT_MAX, HARD_SCAN_MAX, PLANS_MAX, Balancer, Refusal, Want
from routing.health import record_failure
from tests.routing.rows import drop, put, row, table_with

if TYPE_CHECKING:
    from collections.abc import Collection

    from routing.table import RoutingTable, Service
    from routing.target import Target


class Scripted:
    """Draws that a test decides; fails when asked for more than it has."""

    def __init__(self, *draws: float) -> None:
        self.draws = list(draws)

    def random(self) -> float:
        return self.draws.pop(0)


def world(*machines: tuple[str, str], **service: int | str | None) -> RoutingTable:
    """Return a table with an app of these (id, region) machines."""
    rows = [row("machines", id=machine, region=region) for machine, region in machines]
    return table_with(row("services", **service), *rows)


def the_service(table: RoutingTable) -> Service:
    service = table.service("web", 80)
    assert service is not None
    return service


def the_target(table: RoutingTable, machine: str) -> Target:
    target = table.machine(machine)
    assert target is not None
    return target


def balancer(table: RoutingTable, *, panic: bool = True) -> Balancer:
    return Balancer(table, "ams", random.Random(7), panic=panic)


def choose(table: RoutingTable, want: Want = ANYWHERE, tried: Collection[str] = (), now: float = 0.0) -> str:
    """Return the id of the chosen machine, or the code of the refusal."""
    chosen = balancer(table).choose(the_service(table), now, want, tried)
    return chosen.code if isinstance(chosen, Refusal) else chosen.id


def refusal(table: RoutingTable, want: Want = ANYWHERE, tried: Collection[str] = ()) -> Refusal:
    refused = balancer(table).choose(the_service(table), 0.0, want, tried)
    assert isinstance(refused, Refusal)
    return refused


def test_nearest_tier_first_and_a_place_unknown_to_us_last() -> None:
    table = world(("here", "ams"), ("near", "fra"), ("far", "syd"), ("nowhere", "moon"))
    for machine in ("here", "near", "far", "nowhere"):
        assert choose(table) == machine
        drop(table, "machines", id=machine)
    assert choose(table) == "PR01"


def test_measured_round_trips_change_the_order_of_tiers() -> None:
    table = world(("near", "fra"), ("far", "syd"))
    assert choose(table) == "near"
    table.set_round_trips("ams", [("fra", 80.0), ("syd", 10.0)])
    assert choose(table) == "far"


def test_takes_the_less_loaded_of_two_random_machines() -> None:
    table = world(("a", "ams"), ("b", "ams"), ("c", "ams"))
    loads = {"a": 3, "b": 2, "c": 1}
    for machine, load in loads.items():
        the_target(table, machine).in_flight = load
    service = the_service(table)
    picks = {
        (0.0, 0.0): "b",
        (0.0, 0.9): "c",
        (0.4, 0.0): "b",
        (0.4, 0.9): "c",
        (0.9, 0.0): "c",
    }
    for draws, machine in picks.items():
        chosen = Balancer(table, "ams", Scripted(*draws)).choose(service, 0.0)
        assert chosen is table.machine(machine)


def test_equal_loads_spread_evenly() -> None:
    table = world(*((f"m{i}", "ams") for i in range(10)))
    ours, service = balancer(table), the_service(table)
    counts: Counter[str] = Counter()
    for _ in range(5_000):
        chosen = ours.choose(service, 0.0)
        assert not isinstance(chosen, Refusal)
        counts[chosen.id] += 1
    assert len(counts) == 10
    assert min(counts.values()) > 400


def test_in_flight_requests_level_out() -> None:
    table = world(*((f"m{i}", "ams") for i in range(10)), soft_limit=1_000)
    ours, service = balancer(table), the_service(table)
    for _ in range(1_000):
        chosen = ours.choose(service, 0.0)
        assert not isinstance(chosen, Refusal)
        chosen.in_flight += 1
    assert max(target.in_flight for target in table.targets()) <= 105


def test_over_the_soft_limit_spills_to_the_next_tier_and_comes_home_when_that_is_full_too() -> None:
    table = world(("here", "ams"), ("near", "fra"), soft_limit=2, hard_limit=4)
    here, near = the_target(table, "here"), the_target(table, "near")
    assert choose(table) == "here"
    here.in_flight = 2
    assert choose(table) == "near"
    near.remote_load = near.trend = 2
    assert choose(table) == "here"
    here.in_flight = 4
    assert choose(table) == "near"
    near.in_flight = 2
    assert choose(table) == "PR04"


def test_without_a_hard_limit_there_is_always_room() -> None:
    table = world(("here", "ams"))
    the_target(table, "here").in_flight = 10**6
    assert choose(table) == "here"


def test_a_hard_limit_below_the_soft_one_holds() -> None:
    table = world(("here", "ams"), soft_limit=20, hard_limit=1)
    the_target(table, "here").in_flight = 1
    assert choose(table) == "PR04"


def test_at_the_hard_limit_the_refusal_says_that_waiting_may_help() -> None:
    table = world(("a", "ams"), ("b", "fra"), ("c", "fra"), hard_limit=1)
    put(table, "machines", id="c", state="stopped")
    for target in table.targets():
        target.in_flight = 1
    assert refusal(table).at_limit


def test_one_free_machine_among_many_at_the_hard_limit_is_found() -> None:
    table = world(*((f"m{i}", "ams") for i in range(HARD_SCAN_MAX)), soft_limit=1, hard_limit=1)
    for target in table.targets():
        target.in_flight = 1
    the_target(table, "m77").in_flight = 0
    assert choose(table) == "m77"


def test_a_refusal_says_what_machines_fell_to() -> None:
    table = world(("a", "ams"), ("b", "fra"), ("c", "fra"))
    put(table, "machines", id="a", cordoned=1)
    put(table, "machines", id="c", region="fra", state="stopped")
    put(table, "machines", id="b", region="fra", state="stopped")
    assert refusal(table).reason == "no machine of 'web' can take requests: 1 cordoned, 2 not started"
    assert refusal(table, Want(regions=("fra",))).reason.endswith(" in fra can take requests: 2 not started")
    assert refusal(table, Want(regions=("syd",))).reason.endswith(" in syd can take requests: there is none")


def test_a_refusal_counts_a_bounded_number_of_machines() -> None:
    table = world(*((f"m{i}", "ams") for i in range(2 * FALLEN_COUNT_MAX)))
    for target in table.targets():
        put(table, "machines", id=target.id, cordoned=1)
    assert refusal(table).reason.endswith(f": {FALLEN_COUNT_MAX} cordoned")


@pytest.mark.parametrize(
    "change", [{"state": "stopped"}, {"state": "suspended"}, {"state": "draining"}, {"cordoned": 1}]
)
def test_leaves_out_what_is_not_started_or_cordoned_even_in_need(change: dict[str, int | str]) -> None:
    table = world(("a", "ams"), ("b", "syd"))
    put(table, "machines", id="a", **change)
    assert choose(table) == "b"
    drop(table, "machines", id="b")
    assert choose(table) == "PR01"
    assert not refusal(table).at_limit


def test_leaves_out_a_machine_without_any_port() -> None:
    table = world(("b", "syd"))
    put(table, "machines", id="a", region="ams", address="10.0.0.1")
    assert choose(table) == "b"
    drop(table, "machines", id="b")
    assert refusal(table).reason.endswith(": 1 no port")
    put(table, "services", internal_port=80)
    assert choose(table) == "a"


def test_unhealthy_only_when_no_tier_has_anybody_healthy() -> None:
    table = world(("sick", "ams"), ("well", "syd"))
    put(table, "checks", machine="sick", status="critical")
    assert choose(table) == "well"
    put(table, "checks", machine="well", status="critical")
    assert choose(table) == "sick"
    assert choose(table, tried=("sick",)) == "well"
    refused = balancer(table, panic=False).choose(the_service(table), 0.0)
    assert isinstance(refused, Refusal)
    assert refused.reason.endswith(": 2 unhealthy")


def test_waits_for_the_healthy_at_their_limit_rather_than_turn_to_the_unhealthy() -> None:
    table = world(("sick", "ams"), ("well", "ams"), hard_limit=1)
    put(table, "checks", machine="sick", status="critical")
    the_target(table, "well").in_flight = 1
    assert refusal(table).at_limit


def test_unhealthy_machines_have_limits_too() -> None:
    table = world(("sick", "ams"), hard_limit=1)
    put(table, "checks", machine="sick", status="critical")
    the_target(table, "sick").in_flight = 1
    assert refusal(table).at_limit


def test_leaves_out_the_ejected_until_their_time_is_over_or_nobody_else_is_there() -> None:
    table = world(("a", "ams"), ("b", "syd"))
    record_failure(the_target(table, "a"), 10.0)
    assert choose(table, now=10.5) == "b"
    assert choose(table, now=11.0) == "a"
    assert choose(table, now=10.5, tried=("b",)) == "a"


def test_prefers_an_ejected_machine_to_an_unhealthy_one_in_the_same_tier() -> None:
    table = world(("sick", "ams"), ("shaky", "ams"))
    put(table, "checks", machine="sick", status="critical")
    record_failure(the_target(table, "shaky"), 10.0)
    assert choose(table, now=10.0) == "shaky"


def test_tries_every_machine_once_then_refuses() -> None:
    table = world(("a", "ams"), ("b", "ams"), ("c", "fra"))
    tried: list[str] = []
    while (machine := choose(table, tried=tried)) != "PR03":
        assert machine not in tried
        tried.append(machine)
    assert tried[2] == "c"
    assert refusal(table, tried=tried).reason.endswith(" to try: 3 tried")


def test_excluded_machines_are_not_chosen() -> None:
    table = world(("a", "ams"), ("b", "syd"))
    assert choose(table, Want(exclude=frozenset(("a",)))) == "b"
    assert choose(table, Want(exclude=frozenset(("a", "b")))) == "PR01"


def test_regions_are_tried_in_order_and_nothing_else_will_do() -> None:
    table = world(("here", "ams"), ("a", "iad"), ("b", "syd"))
    want = Want(("syd", "lhr", "iad"))
    assert choose(table, want) == "b"
    assert choose(table, want, tried=("b",)) == "a"
    assert choose(table, want, tried=("a", "b")) == "PR03"
    assert choose(table, Want(("lhr",))) == "PR01"


def test_a_last_any_opens_the_rest_nearest_first() -> None:
    table = world(("here", "ams"), ("near", "fra"), ("a", "syd"))
    want = Want(("syd", "any"))
    assert choose(table, want) == "a"
    assert choose(table, want, tried=("a",)) == "here"
    assert choose(table, want, tried=("a", "here")) == "near"


def test_an_area_stands_for_its_regions_nearest_first() -> None:
    table = world(("here", "ams"), ("east", "iad"), ("west", "lax"))
    assert choose(table, Want(("us",))) == "east"
    assert choose(table, Want(("us",)), tried=("east",)) == "west"
    assert choose(table, Want(("apac", "eu"))) == "here"
    assert choose(table, Want(("apac",))) == "PR01"


def test_new_regions_and_own_coordinates_change_the_order_at_once() -> None:
    table = world(("far", "syd"))
    ours, service = balancer(table), the_service(table)
    assert ours.choose(service, 0.0) is table.machine("far")
    put(table, "machines", id="lab", region="lab")
    assert ours.choose(service, 0.0) is table.machine("far")
    put(table, "regions", code="lab", latitude=52.0, longitude=5.0)
    assert ours.choose(service, 0.0) is table.machine("lab")
    drop(table, "machines", id="lab")
    assert ours.choose(service, 0.0) is table.machine("far")
    put(table, "machines", id="near", region="fra")
    assert ours.choose(service, 0.0) is table.machine("near")


def test_balancers_of_two_regions_share_a_table() -> None:
    table = world(("europe", "fra"), ("america", "iad"))
    service = the_service(table)
    east, west = Balancer(table, "ams", random.Random(1)), Balancer(table, "lax", random.Random(1))
    for _ in range(2):
        assert east.choose(service, 0.0) is table.machine("europe")
        assert west.choose(service, 0.0) is table.machine("america")


def test_orders_that_clients_ask_for_do_not_pile_up() -> None:
    table = world(("a", "ams"))
    ours, service = balancer(table), the_service(table)
    for i in range(10 * PLANS_MAX):
        ours.choose(service, 0.0, Want((f"r{i}", "any")))
    assert len(service.owner.plans) <= PLANS_MAX


def test_a_forced_instance_is_taken_whatever_its_checks_and_failures_say() -> None:
    table = world(("a", "ams"), ("b", "syd"))
    put(table, "checks", machine="b", status="critical")
    record_failure(the_target(table, "b"), 0.0)
    assert choose(table, Want(instance="b")) == "b"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"state": "stopped"}, "not started: stopped"),
        ({"cordoned": 1}, "cordoned"),
        ({"app": "api"}, "no machine"),
    ],
)
def test_a_forced_instance_that_cannot_is_refused_with_the_reason(
    change: dict[str, int | str], reason: str
) -> None:
    table = world(("a", "ams"), ("b", "ams"))
    put(table, "machines", id="b", **change)
    refused = refusal(table, Want(instance="b"))
    assert reason in refused.reason
    assert not refused.at_limit


def test_a_forced_instance_waits_at_its_hard_limit() -> None:
    table = world(("a", "ams"), ("b", "ams"), hard_limit=1)
    the_target(table, "b").in_flight = 1
    assert refusal(table, Want(instance="b")).at_limit


def test_a_forced_instance_must_exist_lie_in_the_regions_and_be_untried() -> None:
    table = world(("a", "ams"))
    assert choose(table, Want(instance="zz")) == "PR02"
    assert choose(table, Want(("syd",), instance="a")) == "PR01"
    assert choose(table, Want(("syd", "any"), instance="a")) == "a"
    assert choose(table, Want(instance="a"), tried=("a",)) == "PR03"
    assert choose(table, Want(instance="a", exclude=frozenset(("a",)))) == "PR01"


def test_a_preferred_instance_wins_over_nearer_and_less_loaded_ones() -> None:
    table = world(("a", "ams"), ("b", "syd"), soft_limit=1)
    the_target(table, "b").in_flight = 5
    assert choose(table, Want(prefer_instance="b")) == "b"


@pytest.mark.parametrize(
    "change",
    [{"state": "stopped"}, {"cordoned": 1}, {"app": "api"}, {"address": "10.0.0.1"}, {"region": "iad"}],
)
def test_a_preferred_instance_that_cannot_is_passed_over(change: dict[str, int | str]) -> None:
    table = world(("a", "ams"))
    put(table, "machines", **{"id": "b", "region": "syd", **change})
    assert choose(table, Want(("syd", "ams"), prefer_instance="b")) == "a"


def test_a_preferred_instance_that_is_full_failing_or_tried_is_passed_over() -> None:
    table = world(("a", "ams"), ("b", "ams"), hard_limit=1)
    want = Want(prefer_instance="b")
    assert choose(table, want) == "b"
    assert choose(table, want, tried=("b",)) == "a"
    the_target(table, "b").in_flight = 1
    assert choose(table, want) == "a"
    the_target(table, "b").in_flight = 0
    put(table, "checks", machine="b", status="critical")
    assert choose(table, want) == "a"
    assert choose(table, Want(prefer_instance="zz")) == "a"


def test_is_the_same_for_the_same_seed() -> None:
    table = world(*((f"m{i}", "ams") for i in range(9)))
    service = the_service(table)
    runs = []
    for _ in range(2):
        ours = balancer(table)
        runs.append([ours.choose(service, 0.0) for _ in range(50)])
    assert runs[0] == runs[1]
