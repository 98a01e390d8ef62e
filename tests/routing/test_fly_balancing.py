"""What Fly's pages say of choosing a machine, one case for each thing; where this differs, the id says so."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from routing.balancer import ANYWHERE, Balancer, Refusal, Want
from routing.health import record_failure
from tests.routing.rows import put, row, table_with

if TYPE_CHECKING:
    from collections.abc import Callable

    from routing.table import RoutingTable

case = pytest.param
SOFT, HARD = 10, 20
# id -> region; the edge is in ams.
FLEET = {"a1": "ams", "a2": "ams", "f1": "fra", "g1": "gru"}


class Fleet:
    """Machines in three regions, each with so many requests."""

    def __init__(self) -> None:
        self.table: RoutingTable = table_with(
            row("services", soft_limit=SOFT, hard_limit=HARD),
            *(row("machines", id=machine, region=region) for machine, region in FLEET.items()),
        )

    def load(self, **loads: int) -> None:
        for machine, load in loads.items():
            target = self.table.machine(machine)
            assert target is not None
            target.in_flight = load

    def fail(self, *machines: str) -> None:
        for machine in machines:
            put(self.table, "checks", machine=machine, status="critical")

    def set(self, machine: str, **columns: object) -> None:
        put(self.table, "machines", id=machine, region=FLEET[machine], **columns)

    def refuse(self, machine: str) -> None:
        target = self.table.machine(machine)
        assert target is not None
        record_failure(target, 0.0)

    def choose(self, want: Want, tried: tuple[str, ...], seed: int) -> str:
        service = self.table.service("web", 80)
        assert service is not None
        choice = Balancer(self.table, "ams", random.Random(seed)).choose(service, 0.0, want, tried)
        return choice.code if isinstance(choice, Refusal) else choice.id


def all_machines(load: int) -> Callable[[Fleet], None]:
    return lambda f: f.load(**dict.fromkeys(FLEET, load))


def usual(fleet: Fleet) -> None:
    """As it is."""


CHOICES = [
    # Who is a candidate.
    case(usual, {}, {"a1", "a2"}, id="4.1-the-closest"),
    case(lambda f: f.set("a1", state="stopped"), {}, {"a2"}, id="4.1-not-the-stopped"),
    case(lambda f: f.set("a1", cordoned=1), {}, {"a2"}, id="4.1-not-the-cordoned"),
    case(lambda f: f.fail("a1"), {}, {"a2"}, id="4.1-not-the-unhealthy"),
    case(lambda f: f.refuse("a1"), {}, {"a2"}, id="4.1-not-who-just-failed"),
    case(usual, {"tried": ("a1",)}, {"a2"}, id="4.1-not-who-was-tried"),
    case(usual, {"want": Want(exclude=frozenset({"a1"}))}, {"a2"}, id="4.1-not-who-was-excluded"),
    case(lambda f: f.set("a1", app="other"), {}, {"a2"}, id="4.1-not-of-another-app"),
    # Three classes of load.
    case(lambda f: f.load(a1=0, a2=SOFT - 1), {}, {"a1"}, id="4.1-below-soft-the-less-loaded-not-any"),
    case(lambda f: f.load(a1=SOFT), {}, {"a2"}, id="4.1-at-soft-only-if-the-others-are"),
    case(lambda f: f.load(a1=HARD, a2=HARD), {}, {"f1"}, id="4.1-at-hard-nothing-new"),
    case(lambda f: f.load(a1=HARD, a2=SOFT), {}, {"f1"}, id="4.1-over-soft-the-next-region-not-the-same"),
    case(all_machines(SOFT), {}, {"a1", "a2"}, id="4.1-all-over-soft-the-closest"),
    case(lambda f: f.load(a1=SOFT, a2=SOFT, f1=SOFT), {}, {"g1"}, id="4.1-any-region-below-soft-first"),
    case(all_machines(HARD), {}, {"PR04"}, id="4.3-all-at-hard-it-waits"),
    # Regions.
    case(lambda f: f.fail("a1", "a2"), {}, {"f1"}, id="4.1-another-region-when-the-local-are-unhealthy"),
    case(lambda f: f.fail("a1", "a2", "f1"), {}, {"g1"}, id="4.1-the-next-closest"),
    case(lambda f: f.fail(*FLEET), {}, {"a1", "a2"}, id="4.1-all-unhealthy-they-are-tried-not-refused"),
    case(lambda f: [f.set(m, state="stopped") for m in FLEET], {}, {"PR01"}, id="4.1-nobody-is-started"),
    case(usual, {"tried": tuple(FLEET)}, {"PR03"}, id="4.4-all-were-tried"),
    case(usual, {"want": Want(("gru",))}, {"g1"}, id="4.1-the-region-asked-for"),
    case(
        lambda f: f.load(g1=HARD), {"want": Want(("gru",))}, {"PR04"}, id="4.1-and-no-other-when-it-is-full"
    ),
    case(
        lambda f: f.load(g1=HARD), {"want": Want(("gru", "any"))}, {"a1", "a2"}, id="4.1-unless-any-will-do"
    ),
    case(
        lambda f: f.fail("g1"),
        {"want": Want(instance="g1")},
        {"g1"},
        id="4.1-an-instance-whatever-its-checks",
    ),
]


@pytest.mark.parametrize(("prepare", "asked", "chosen"), CHOICES)
def test_choice(prepare: Callable[[Fleet], None], asked: dict[str, object], chosen: set[str]) -> None:
    fleet = Fleet()
    prepare(fleet)
    want, tried = asked.get("want", ANYWHERE), asked.get("tried", ())
    counted = Counter(fleet.choose(want, tried, seed) for seed in range(40))
    assert set(counted) == chosen, counted


def test_4_1_ties_are_decided_by_chance() -> None:
    fleet = Fleet()
    counted = Counter(fleet.choose(ANYWHERE, (), seed) for seed in range(400))
    assert min(counted.values()) > 150
