"""What the admin API shows of machines and their checks.

Decides the shape of each. Changes nothing. Invariant: what comes from the table is the same on all nodes, and
what only this node knows (last probes, what its workers leave out) is told apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from isthmus.config import format_address
from routing.types import CheckRow, GoalRow, MachineRow

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from isthmus.checking.checker import LastProbe
    from routing.table import RoutingTable

Rows = list[dict[str, Any]]


class Fate(Protocol):
    """What becomes of a machine in routing, and why."""

    @property
    def routable(self) -> bool:
        """Whether it takes requests."""

    @property
    def verdict(self) -> str:
        """Why, or why not."""


def describe_machines(
    table: RoutingTable, fates: Mapping[str, Fate], nobody: Fate, failing: Mapping[str, Any]
) -> Rows:
    """Return every machine, with its checks and what the balancer says of it."""
    checks: dict[str, Rows] = {}
    for check in sorted(_rows(table, "checks", CheckRow), key=lambda check: check.name):
        checks.setdefault(check.machine, []).append(_describe_check(check))
    passive = sum_failing(failing)
    in_order = sorted(_rows(table, "machines", MachineRow), key=lambda m: (m.app, m.region, m.id))
    return [
        {
            "machine": machine.id,
            "app": machine.app,
            "region": machine.region,
            "node": machine.node,
            "address": machine.host if machine.port is None else format_address(machine.host, machine.port),
            "state": machine.state.value,
            "since_ms": machine.since_ms,
            "driver": machine.driver,
            "version": machine.version,
            "goal": _describe_goal(table, machine),
            "problem": machine.problem,
            "cordoned": machine.cordoned,
            "checks": checks.get(machine.id, []),
            "failing": passive.get(machine.id),
            "routable": fates.get(machine.id, nobody).routable,
            "verdict": fates.get(machine.id, nobody).verdict,
        }
        for machine in in_order
    ]


def describe_checks(
    table: RoutingTable, last_probes: Mapping[tuple[str, str], LastProbe], now_ms: int
) -> Rows:
    """Return every check with its result; of those that this node runs, also what the last probe found."""
    shown = []
    for check in sorted(_rows(table, "checks", CheckRow), key=lambda check: (check.machine, check.name)):
        target = table.machine(check.machine)
        last = last_probes.get((check.machine, check.name))
        shown.append(
            {
                "machine": check.machine,
                "app": target.app if target is not None else None,
                **_describe_check(check),
                "last_output": last.output if last is not None else None,
                "last_ms_ago": max(0, now_ms - last.at_ms) if last is not None else None,
            }
        )
    return shown


def _describe_check(check: CheckRow) -> dict[str, Any]:
    return {
        "name": check.name,
        "status": check.status.value,
        "node": check.node,
        "since_ms": check.since_ms,
        "updated_ms": check.updated_ms,
        "output": check.output,
    }


def _describe_goal(table: RoutingTable, machine: MachineRow) -> dict[str, Any] | None:
    goal = table.rows("goals").get((machine.id,))
    if not isinstance(goal, GoalRow) or not machine.driver:
        return None
    return {
        "state": goal.state.value,
        "reason": goal.reason,
        "asked_by": goal.asked_by,
        "asked_ms": goal.asked_ms,
    }


def sum_failing(failing: Mapping[str, Iterable[tuple[str, int, float]]]) -> dict[str, dict[str, Any]]:
    """Return how many workers of this node leave each machine out, and after how many failures in a row."""
    found: dict[str, dict[str, Any]] = {}
    for machines in failing.values():
        for machine, failures, left_s in machines:
            shown = found.setdefault(machine, {"failures": 0, "workers": 0})
            shown["failures"] = max(shown["failures"], failures)
            shown["workers"] += left_s > 0
    return found


def _rows(table: RoutingTable, name: str, kind: type[Any]) -> list[Any]:
    return [row for row in table.rows(name).values() if isinstance(row, kind)]
