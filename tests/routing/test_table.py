from __future__ import annotations

from routing.table import RoutingTable
from tests.routing.rows import drop, put, row, table_with


def test_finds_the_service_of_the_app_behind_host_and_path() -> None:
    table = table_with(
        row("apps", name="api"),
        row("services", app="api", internal_port=9000),
        row("hostnames", path_prefix="/api", app="api"),
    )
    web, api = table.find(b"web.test:8443", b"/", 443), table.find(b"WEB.test", b"/api/x?y", 443)
    assert web is not None
    assert api is not None
    assert (web.app, api.app, api.internal_port) == ("web", "api", 9000)
    assert table.find(b"other.test", b"/", 443) is None


def test_a_port_of_its_own_wins_over_the_service_for_any_port() -> None:
    table = table_with(row("services", port=9090, soft_limit=1))
    exact, other = table.service("web", 9090), table.service("web", 443)
    assert exact is not None
    assert other is not None
    assert (exact.port, other.port) == (9090, 0)
    drop(table, "services")
    assert table.service("web", 443) is None
    assert table.service("web", 9090) is exact


def test_an_app_without_its_row_or_service_is_not_routable_until_they_arrive() -> None:
    table = RoutingTable()
    put(table, "machines")
    put(table, "hostnames")
    assert table.find(b"web.test", b"/", 80) is None
    put(table, "services")
    assert table.find(b"web.test", b"/", 80) is None
    put(table, "apps")
    service = table.find(b"web.test", b"/", 80)
    assert service is not None
    assert [target.id for target in service.targets()] == ["m1"]
    drop(table, "apps")
    assert table.find(b"web.test", b"/", 80) is None


def test_objects_keep_their_identity_through_updates() -> None:
    table = table_with(row("machines"))
    target, service = table.machine("m1"), table.service("web", 80)
    assert target is not None
    assert service is not None
    target.in_flight = 3
    put(table, "machines", region="iad", state="stopped", cordoned=1)
    put(table, "services", soft_limit=5, hard_limit=6)
    put(table, "apps", network="blue")
    assert table.machine("m1") is target
    assert table.service("web", 80) is service
    assert (target.region, target.state.value, target.cordoned, target.in_flight) == (
        "iad",
        "stopped",
        True,
        3,
    )
    assert (service.soft_limit, service.hard_limit, service.network) == (5, 6, "blue")


def test_a_machine_moves_with_its_row_to_another_app_and_region() -> None:
    table = table_with(row("machines"), row("apps", name="api"), row("services", app="api"))
    put(table, "machines", app="api", region="iad")
    web, api, target = table.service("web", 80), table.service("api", 80), table.machine("m1")
    assert web is not None
    assert api is not None
    assert list(web.targets()) == []
    assert list(api.targets()) == [target]
    assert target is not None
    assert (target.app, target.region) == ("api", "iad")


def test_a_deleted_machine_is_marked_and_a_new_one_of_its_name_is_another() -> None:
    table = table_with(row("machines"))
    before = table.machine("m1")
    drop(table, "machines")
    assert table.machine("m1") is None
    assert before is not None
    assert before.removed
    put(table, "machines")
    assert table.machine("m1") is not before


def test_a_new_address_forgets_failures_of_the_old_one() -> None:
    table = table_with(row("machines"))
    target = table.machine("m1")
    assert target is not None
    target.failures, target.ejected_until = 4, 99.0
    put(table, "machines", state="draining")
    assert (target.failures, target.ejected_until) == (4, 99.0)
    put(table, "machines", address="[fdaa::1]:80")
    assert (target.failures, target.ejected_until) == (0, 0.0)
    assert (target.host, target.port, target.address) == ("fdaa::1", 80, "[fdaa::1]:80")


def test_the_port_comes_from_the_address_or_else_from_the_service() -> None:
    table = table_with(row("machines", address="10.0.0.1"), row("services", port=81, internal_port=8081))
    target, plain, named = table.machine("m1"), table.service("web", 80), table.service("web", 81)
    assert target is not None
    assert plain is not None
    assert named is not None
    assert plain.upstream_port(target) is None
    assert named.upstream_port(target) == 8081
    put(table, "machines", address="10.0.0.1:7000")
    assert named.upstream_port(target) == 7000


def test_any_critical_check_makes_unhealthy_and_warnings_do_not() -> None:
    table = table_with()
    put(table, "checks", name="early", status="critical")
    put(table, "machines")
    target = table.machine("m1")
    assert target is not None
    assert not target.healthy
    put(table, "checks", name="late", status="warning")
    put(table, "checks", name="early", status="passing")
    assert target.healthy
    put(table, "checks", name="late", status="critical")
    assert not target.healthy
    assert set(target.checks) == {"early", "late"}
    drop(table, "checks", name="late")
    assert target.healthy
    drop(table, "checks", name="early")
    assert target.healthy
    assert not target.checks


def test_load_of_other_nodes_adds_up_and_our_own_is_left_out() -> None:
    table = table_with(row("loads", node="n2", in_flight=3), row("loads", node="n1", in_flight=50))
    put(table, "machines")
    target = table.machine("m1")
    assert target is not None
    target.in_flight = 2
    put(table, "loads", node="n3", in_flight=4)
    assert (target.remote_load, target.load) == (7, 9)
    put(table, "loads", node="n2", in_flight=1)
    drop(table, "loads", node="n3")
    drop(table, "loads", node="n1")
    assert target.load == 3


def test_a_bad_row_is_rejected_alone_and_counts_as_absent() -> None:
    table = table_with(row("machines"), row("machines", id="m2"))
    put(table, "machines", address="10.0.0.1:99999")
    assert table.machine("m1") is None
    assert table.machine("m2") is not None
    assert "port" in table.rejected["machines", ("m1",)]
    put(table, "machines")
    assert table.machine("m1") is not None
    assert not table.rejected
    put(table, "machines", id="m3", state="dancing")
    drop(table, "machines", id="m3")
    assert not table.rejected


def test_rows_of_other_tables_and_deletes_of_absent_rows_change_nothing() -> None:
    table = table_with(row("machines"))
    table.apply("cats", ("tom",), ("tom", 9))
    drop(table, "machines", id="m9")
    drop(table, "hostnames", hostname="absent.test")
    assert not table.rejected
    assert [target.id for target in table.targets()] == ["m1"]


def test_load_holds_exactly_the_new_rows_and_keeps_what_stays() -> None:
    table = table_with(row("machines"), row("machines", id="m2"), row("apps", name="gone"))
    put(table, "machines", id="bad", state="dancing")
    stays = table.machine("m1")
    table.load([row("machines", address="10.9.9.9:1"), row("machines", id="m3"), row("apps")])
    assert sorted(target.id for target in table.targets()) == ["m1", "m3"]
    assert table.machine("m1") is stays
    assert stays is not None
    assert stays.host == "10.9.9.9"
    assert not table.rejected
    assert list(table.routes()) == []
    assert [app.name for app in table.apps()] == ["web"]


def test_apps_that_no_row_speaks_of_are_forgotten() -> None:
    table = RoutingTable()
    put(table, "machines")
    put(table, "machines", region="iad")
    put(table, "services", port=1)
    put(table, "apps")
    drop(table, "machines")
    drop(table, "apps")
    assert table.app("web") is not None
    drop(table, "services", port=1)
    assert table.app("web") is None
    assert list(table.apps()) == []


def test_a_region_is_known_when_built_in_own_an_area_or_in_use() -> None:
    table = RoutingTable()
    assert table.knows_region("ams")
    assert table.knows_region("any")
    assert not table.knows_region("lab")
    put(table, "regions", code="lab")
    assert table.knows_region("lab")
    drop(table, "regions", code="lab")
    assert not table.knows_region("lab")
    put(table, "machines", region="lab")
    put(table, "nodes", region="lab")
    put(table, "machines", region="attic")
    assert table.knows_region("lab")
    drop(table, "nodes", region="lab")
    assert not table.knows_region("lab")
    assert table.knows_region("attic")
