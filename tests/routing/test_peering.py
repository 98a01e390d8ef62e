from __future__ import annotations

import json
from random import Random
from typing import TYPE_CHECKING

import pytest

from routing.balancer import Balancer
from routing.peering import Relay, Way
from tests.routing.rows import drop, put, row, table_with

if TYPE_CHECKING:
    from routing.table import RoutingTable


def put_node(table: RoutingTable, name: str, region: str = "syd", **peering: object) -> None:
    put(table, "nodes", id=name, region=region, peering=json.dumps(peering))


def table_of(address: str, node: str = "n2", region: str = "syd") -> RoutingTable:
    return table_with(row("machines", id="m1", node=node, address=address, region=region))


def find(table: RoutingTable, wish: Way | None = None, passed: int = 0) -> Way:
    target = table.machine("m1")
    assert target is not None
    return table.ways.find(target, wish, passed)


def names(table: RoutingTable, passed: int = 0) -> list[str]:
    target = table.machine("m1")
    assert target is not None
    return [relay.node for relay in table.ways.relays(target, passed)]


def test_without_nodes_that_say_anything_all_machines_are_direct() -> None:
    table = table_of("127.0.0.1:80")
    put(table, "nodes", id="n2")
    assert not table.ways.active
    assert find(table) is Way.DIRECT


@pytest.mark.parametrize(
    "address", ["127.0.0.1:80", "127.9.9.9:80", "[::1]:80", "[::ffff:127.0.0.1]:80", "localhost:80"]
)
def test_loopback_of_another_node_is_reached_through_it(address: str) -> None:
    table = table_of(address)
    put_node(table, "n2", address="10.0.0.2:9")
    assert find(table) is Way.NODE
    assert table.ways.relays(table.machine("m1")) == (Relay("n2", "10.0.0.2", 9),)


def test_loopback_stays_direct_when_its_owner_passes_nothing_on() -> None:
    table = table_of("127.0.0.1:80")
    put_node(table, "n2", networks=["10.0.0.0/8"])
    put_node(table, "n3", address="10.0.0.3:9")
    assert find(table) is Way.DIRECT


def test_own_machines_are_direct_whatever_is_said() -> None:
    table = table_of("127.0.0.1:80", node="n1")
    put_node(table, "n1", address="10.0.0.1:9", machines="node")
    put_node(table, "n2", address="10.0.0.2:9")
    assert find(table) is Way.DIRECT
    assert find(table, Way.NODE) is Way.DIRECT


def test_networks_of_the_owner_are_reached_through_a_node_and_others_as_it_says() -> None:
    table = table_of("10.1.2.3:80")
    put_node(table, "n2", networks=["10.0.0.0/8"], machines="auto")
    assert find(table) is Way.NODE
    put_node(table, "n2", networks=["10.2.0.0/16", "fd00::/8"], machines="auto")
    assert find(table) is Way.AUTO
    put(table, "machines", id="m1", node="n2", address="db.internal:80")
    assert find(table) is Way.AUTO


def test_what_the_app_says_goes_before_and_is_over_once_passed_on() -> None:
    table = table_of("192.0.2.1:80")
    put_node(table, "n2", address="10.0.0.2:9")
    assert find(table, Way.NODE) is Way.NODE
    assert find(table, Way.NODE, passed=1) is Way.DIRECT
    put_node(table, "n2", address="10.0.0.2:9", machines="auto")
    assert find(table, passed=1) is Way.DIRECT
    put_node(table, "n2", address="10.0.0.2:9", networks=["192.0.2.0/24"])
    assert find(table, Way.DIRECT) is Way.DIRECT
    assert find(table, Way.DIRECT, passed=1) is Way.NODE


def test_a_node_passes_on_by_itself_what_its_owner_takes_nowhere() -> None:
    table = table_of("10.1.2.3:80")
    put_node(table, "n2", networks=["10.0.0.0/8"])
    put_node(table, "n3", address="10.0.0.3:9")
    assert find(table) is Way.NODE
    assert names(table) == ["n3"]
    assert find(table, passed=1) is Way.DIRECT


def test_a_node_passes_on_by_itself_what_an_owner_that_says_nothing_has() -> None:
    table = table_of("10.1.2.3:80")
    put_node(table, "n3", address="10.0.0.3:9")
    assert find(table, Way.NODE) is Way.NODE
    assert names(table) == ["n3"]
    assert find(table, Way.NODE, passed=1) is Way.DIRECT


def test_owner_is_the_first_relay_and_the_region_of_the_machine_has_the_others() -> None:
    table = table_of("10.1.2.3:80", region="gru")
    put_node(table, "n4", "gru", address="10.0.0.4:9")
    put_node(table, "n2", "syd", address="10.0.0.2:9")
    put_node(table, "n3", "gru", address="10.0.0.3:9")
    put_node(table, "n5", "syd", address="10.0.0.5:9")
    put_node(table, "n1", "gru", address="10.0.0.1:9")
    assert names(table) == ["n2", "n3", "n4"]
    assert names(table, passed=1) == ["n2"]
    drop(table, "nodes", id="n2")
    assert names(table) == ["n3", "n4"]


@pytest.mark.parametrize(
    ("machines", "said"),
    [
        ("direct", ""),
        ("node", "through node n2"),
        ("auto", "through node n2 while it cannot be connected to"),
    ],
)
def test_explanation_says_through_which_node(machines: str, said: str) -> None:
    table = table_of("10.1.2.3:80")
    put_node(table, "n2", address="10.0.0.2:9", machines=machines)
    service = table.find(b"web.test", b"/", 80)
    assert service is not None
    ((_, why),) = Balancer(table, "ams", Random(1)).explain(service, 0.0)
    assert why == "; ".join(filter(None, ["candidate: 0 of 20", said]))
    put_node(table, "n2", machines=machines)
    ((_, why),) = Balancer(table, "ams", Random(1)).explain(service, 0.0)
    assert ("none passes requests on" in why) == (machines == "node")


def test_a_changed_node_changes_what_was_found_before() -> None:
    table = table_of("127.0.0.1:80")
    put_node(table, "n2", address="10.0.0.2:9")
    assert find(table) is Way.NODE
    put(table, "machines", id="m1", node="n3", address="127.0.0.1:80")
    assert find(table) is Way.DIRECT
    put(table, "machines", id="m1", node="n2", address="127.0.0.1:80")
    drop(table, "nodes", id="n2")
    assert find(table) is Way.DIRECT
    assert not table.ways.active


@pytest.mark.parametrize(
    "peering",
    [
        "[]",
        "{",
        '{"address": 1}',
        '{"address": "10.0.0.1"}',
        '{"address": "nowhere:"}',
        '{"networks": "10.0.0.0/8"}',
        '{"networks": [7]}',
        '{"networks": ["10.0.0.1/8"]}',
        '{"machines": "sometimes"}',
        '{"machines": []}',
        json.dumps({"networks": ["10.0.0.0/8"] * 65}),
    ],
)
def test_a_node_that_speaks_nonsense_is_refused(peering: str) -> None:
    table = table_with()
    put(table, "nodes", id="n2", peering=peering)
    assert ("nodes", ("n2",)) in table.rejected
    assert not table.ways.active


def test_what_a_newer_node_says_beyond_is_passed_over() -> None:
    table = table_of("127.0.0.1:80")
    put_node(table, "n2", address="10.0.0.2:9", weight=3)
    assert find(table) is Way.NODE


def test_row_of_a_node_that_knows_no_peering_is_accepted() -> None:
    table = table_with()
    table.apply("nodes", ("n2",), ("n2", "syd", "", 0, ""))
    assert not table.rejected


def test_requests_passed_on_count_once_with_what_their_nodes_report() -> None:
    table = table_of("10.1.2.3:80", node="n1")
    target = table.machine("m1")
    assert target is not None
    table.count_relayed("m1", 3)
    assert target.load == 3
    put(table, "loads", machine="m1", node="n2", in_flight=2)
    assert target.load == 3
    put(table, "loads", machine="m1", node="n3", in_flight=2)
    assert target.load == 4
    table.count_relayed("m1", -3)
    assert target.load == 4
