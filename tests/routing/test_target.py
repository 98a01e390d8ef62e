"""What a machine keeps of its row is what the row says."""

from __future__ import annotations

import pytest

from routing import target
from routing.table import RoutingTable
from routing.target import UPKEEPS_MAX, Target, pack_v4, share_upkeep
from routing.types import MachineRow, MachineState
from tests.routing.rows import put, row, table_with

ADDRESSES = ("10.0.0.1", "0.0.0.0", "255.255.255.255", "1.20.30.0")
OTHERS = (
    *("", "a.test", "1.2.3", "1.2.3.4.5", "256.1.1.1", "1..2.3", "01.2.3.4", "00.1.1.1", "1.2.3.a"),
    *("::1", "fdaa:0:1::3", "\u0661.2.3.4", "-1.2.3.4", "+1.2.3.4", " 1.2.3.4"),
)


@pytest.mark.parametrize("host", [*ADDRESSES, *OTHERS])
def test_a_host_stays_as_it_is_written(host: str) -> None:
    assert (pack_v4(host) >= 0) is (host in ADDRESSES)
    fields = ("m", "web", "n1", "ams", host, 80, MachineState.STARTED, False, "", "", 0, "", 100, 0)
    one = Target(fields)
    assert one.fields == fields
    assert one.host == host
    assert one.fields == fields
    assert one.row == MachineRow(*fields)


def test_a_machine_that_moves_is_found_at_its_new_address() -> None:
    table = table_with(row("machines"))
    machine = table.machine("m1")
    assert machine is not None
    for host in ("10.0.0.1", "10.0.0.2", "a.test", "10.0.0.3"):
        put(table, "machines", address=f"{host}:8080")
        assert machine.host == host


def test_what_is_alike_is_in_memory_once() -> None:
    one = share_upkeep("config:n1", "local", "", 7)
    assert one is share_upkeep("config:n1", "local", "", 7)
    for version in range(UPKEEPS_MAX + 1):
        share_upkeep("", "", "", version)
    assert len(target._upkeeps) <= UPKEEPS_MAX
    assert (one.managed_by, one.driver, one.problem, one.version) == ("config:n1", "local", "", 7)


def test_rows_that_are_made_again_are_those_that_came() -> None:
    rows = (
        row("machines", driver="local", problem="no room", version=3, managed_by="config:n1", weight=50),
        row("apps", managed_by="config:n1"),
        row("hostnames", managed_by="config:n1"),
        row("hostnames", path_prefix="/é"),
        row("hostnames", hostname="*.test"),
        row("services", port=80, managed_by="config:n1", options='{"panic_percent": 5}'),
        row("services", soft_limit=3),
    )
    table = table_with(*rows)
    for name in ("machines", "apps", "hostnames", "services"):
        held = table.rows(name)
        assert set(held) == {pk for table_name, pk, _ in rows if table_name == name}
        fresh = RoutingTable()
        for one in rows:
            fresh.apply(*one)
        assert fresh.rows(name) == held
        again = {pk: fresh.rows(name)[pk] for pk in held}
        for one in rows:
            fresh.apply(*one)
        assert fresh.rows(name) == again
    for one in rows:
        table.apply(one[0], one[1], None)
    assert not any(table.rows(name) for name in ("machines", "apps", "hostnames", "services"))
    assert list(table.apps()) == []
