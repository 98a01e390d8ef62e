from __future__ import annotations

import random

from routing.balancer import ANYWHERE, Balancer, Want
from routing.explain import explain_route
from routing.health import record_failure
from routing.table import RoutingTable
from tests.routing.rows import put, row, table_with


def explain(table: RoutingTable, want: Want = ANYWHERE, tried: tuple[str, ...] = ()) -> dict[str, str]:
    service = table.service("web", 80)
    assert service is not None
    return {
        target.id: verdict
        for target, verdict in Balancer(table, "ams", random.Random(1)).explain(service, 10.0, want, tried)
    }


def test_says_of_every_machine_what_drops_it() -> None:
    ids = ("free", "busy", "full", "sick", "shaky", "cordoned", "stopped", "far", "tried", "excluded")
    machines = [row("machines", id=machine, region="syd" if machine == "far" else "ams") for machine in ids]
    table = table_with(row("services", soft_limit=1, hard_limit=2), *machines)
    put(table, "machines", id="portless", address="10.0.0.1")
    put(table, "machines", id="cordoned", cordoned=1)
    put(table, "machines", id="stopped", state="stopped")
    put(table, "checks", machine="sick", name="http", status="critical")
    put(table, "checks", machine="sick", name="tcp", status="passing")
    put(table, "loads", machine="busy", in_flight=1)
    put(table, "loads", machine="full", in_flight=2)
    table.follow_loads()
    shaky = table.machine("shaky")
    assert shaky is not None
    record_failure(shaky, 9.5)
    assert explain(table, Want(("eu",), exclude=frozenset(("excluded",))), ("tried",)) == {
        "free": "candidate: 0 of 1",
        "busy": "over soft limit: 1 of 1",
        "full": "at hard limit: 2 of 2",
        "sick": "unhealthy: http critical",
        "shaky": "ejected: for another 0.5 s, failures in a row: 1",
        "cordoned": "cordoned",
        "stopped": "not started: stopped",
        "portless": "no port: neither its address nor the service's internal_port names one",
        "far": "other region",
        "tried": "tried",
        "excluded": "excluded",
    }


def test_lists_the_nearest_first_and_those_out_of_reach_last() -> None:
    table = table_with(
        *(row("machines", id=region, region=region) for region in ("syd", "ams", "iad", "fra"))
    )
    assert list(explain(table)) == ["ams", "fra", "iad", "syd"]
    assert list(explain(table, Want(("iad", "eu")))) == ["iad", "ams", "fra", "syd"]


def test_says_that_others_are_not_the_forced_instance() -> None:
    table = table_with(row("machines"), row("machines", id="m2"))
    assert explain(table, Want(instance="m2")) == {"m1": "not the instance", "m2": "candidate: 0 of 20"}


def test_says_at_which_step_a_lookup_ends() -> None:
    table = RoutingTable()
    put(table, "machines")
    put(table, "machines", id="m2", region="iad")
    assert explain_route(table, b"web.test", b"/", 80).reason == "no hostname and path prefix match"
    put(table, "hostnames")
    assert explain_route(table, b"web.test", b"/", 80).reason == "app 'web' has no row in apps"
    put(table, "apps")
    explained = explain_route(table, b"web.test", b"/", 80)
    assert explained.app == "web"
    assert explained.reason == "app 'web' has no service on port 80: its 2 machines are not routable there"
    put(table, "services")
    explained = explain_route(table, b"web.test", b"/", 80)
    assert explained.service is table.service("web", 80)
    assert explained.reason == ""


def test_a_route_to_an_app_that_nothing_else_names_is_explained() -> None:
    table = RoutingTable()
    put(table, "hostnames", app="ghost")
    assert explain_route(table, b"web.test", b"/", 80).reason == "app 'ghost' has no row in apps"
