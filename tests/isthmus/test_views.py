from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from isthmus.admin.views import Views
from isthmus.config import Config
from replication.report import MemberView
from routing.table import RoutingTable
from tests.routing.rows import row

if TYPE_CHECKING:
    from isthmus.feed import FeedServer
    from replication.agent import Agent

CONFIG = Config(node="n1", data="/nowhere")


class Membership:
    """The part of an agent that says who is there."""

    def __init__(self, *members: MemberView) -> None:
        self._members = members

    def members(self) -> list[MemberView]:
        return list(self._members)


def member(
    name: str, port: int, state: str = "alive", heard_ms_ago: float | None = 100.0, *, is_self: bool = False
) -> MemberView:
    return MemberView(name, f"{port:032x}", ("127.0.0.1", port), state, 1, None, heard_ms_ago, is_self)


def shown(*members: MemberView) -> list[tuple[Any, ...]]:
    agent = cast("Agent", Membership(*members))
    views = Views(CONFIG, agent, RoutingTable("n1"), cast("FeedServer", None))
    return [(node["node"], node["gossip"], node["state"], node["self"]) for node in views.nodes()]


ITSELF = member("n1", 1, heard_ms_ago=0.0, is_self=True)
ITSELF_SHOWN = ("n1", "127.0.0.1:1", "alive", True)


def test_two_nodes_of_one_name_are_both_shown() -> None:
    namesake = member("n1", 2)
    expected = [ITSELF_SHOWN, ("n1", "127.0.0.1:2", "alive", False)]
    assert shown(ITSELF, namesake) == expected
    assert shown(namesake, ITSELF) == expected


@pytest.mark.parametrize("order", [1, -1])
def test_node_that_came_back_without_its_data_is_shown_as_what_it_is_now(order: int) -> None:
    before, after = member("n2", 2, "left", 5_000.0), member("n2", 3, "suspect", 200.0)
    assert shown(ITSELF, *(before, after)[::order]) == [
        ITSELF_SHOWN,
        ("n2", "127.0.0.1:3", "suspect", False),
    ]


@pytest.mark.parametrize("order", [1, -1])
def test_of_a_name_that_nobody_has_any_more_the_last_that_was_heard_is_shown(order: int) -> None:
    first, last = member("n2", 2, "dead", None), member("n2", 3, "dead", 9_000.0)
    assert shown(ITSELF, *(first, last)[::order]) == [ITSELF_SHOWN, ("n2", "127.0.0.1:3", "dead", False)]


def test_only_a_node_that_is_there_says_since_when() -> None:
    table = RoutingTable("n1")
    for name in ("n1", "n2", "n3", "n4"):
        table.apply(*row("nodes", id=name, started_ms=7))
    agent = cast("Agent", Membership(ITSELF, member("n2", 2, "suspect"), member("n3", 3, "dead")))
    views = Views(CONFIG, agent, table, cast("FeedServer", None))
    assert [(node["state"], node["started_ms"]) for node in views.nodes()] == [
        ("alive", 7),
        ("suspect", 7),
        ("dead", None),
        ("unknown", None),
    ]


def test_regions_say_where_their_round_trip_is_from_and_come_in_its_order() -> None:
    table = RoutingTable("n1")
    for one in (
        *(row("machines", id=f"m-{code}", region=code) for code in ("fra", "syd", "moon")),
        *(row("nodes", id=f"n-{code}", region=code) for code in ("fra", "syd")),
    ):
        table.apply(*one)
    table.set_round_trips("ams", [("syd", 3.0)])
    config = Config(node="n1", data="/nowhere", region="ams")
    views = Views(config, cast("Agent", Membership(ITSELF)), table, cast("FeedServer", None))
    assert [(r["region"], r["order"], r["rtt_from"], r["nodes"], r["machines"]) for r in views.regions()] == [
        ("ams", 1, "here", 0, 0),
        ("syd", 2, "measured", 1, 1),
        ("fra", 3, "distance", 1, 1),
        ("moon", 4, "unknown", 0, 1),
    ]
    assert views.regions()[-1]["rtt_ms"] is None
