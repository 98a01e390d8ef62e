"""What the admin API shows: the table as this node sees it, and how old that is.

Decides the shape of each answer. Changes nothing, and asks no database: it shows the rows that routing uses,
and says of the others why it does not. Invariant: what is shown as routable is what the balancer of this
node would consider now, because the balancer's own filter is asked.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from isthmus import __version__, compiled
from isthmus.admin.machine_views import describe_checks, describe_machines
from isthmus.config import format_address
from isthmus.reloading import Lifecycle
from routing.balancer import ANYWHERE
from routing.explain import Verdict, describe, judge
from routing.types import HostnameRow, MachineRow, NodeRow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from isthmus.checking.checker import LastProbe
    from isthmus.config import Config
    from isthmus.feed import FeedServer
    from replication.agent import Agent
    from replication.report import MemberView
    from routing.table import RoutingTable

Rows = list[dict[str, Any]]
Row = TypeVar("Row")

# What membership says of a node that takes part.
PRESENT = frozenset({"alive", "suspect"})

# What the balancer may say of a machine that takes requests.
ROUTABLE = frozenset({Verdict.CANDIDATE, Verdict.OVER_SOFT})


class _Fate(NamedTuple):
    """What becomes of a machine in routing, and why."""

    routable: bool
    verdict: str


_NO_SERVICE = _Fate(routable=False, verdict="its app has no service")


class Views:
    """Shows one node's table, membership and processes."""

    def __init__(
        self,
        config: Config,
        agent: Agent,
        table: RoutingTable,
        feed: FeedServer,
        *,
        lifecycle: Callable[[], Lifecycle] = Lifecycle,
        last_probes: Callable[[], Mapping[tuple[str, str], LastProbe]] = dict,
        staged: Callable[[], Mapping[str, int]] = dict,
        rollout: Callable[[], Mapping[str, Any]] = dict,
        traffic: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._config = config
        self._lifecycle = lifecycle
        self._last_probes = last_probes
        self._staged = staged
        self._rollout = rollout
        self._traffic = traffic
        self._agent = agent
        self._table = table
        self._feed = feed

    def status(self) -> dict[str, Any]:
        """Return the node, its processes and replication state, and the rows that cannot be used."""
        config = self._config
        rejected = [
            {"table": table, "key": [_readable(part) for part in key], "reason": reason}
            for (table, key), reason in self._table.rejected.items()
        ]
        return {
            "node": config.node,
            "region": config.region,
            "software": f"isthmus {__version__}",
            "compiled": compiled.is_compiled(),
            "workers": config.workers,
            "agent_pid": os.getpid(),
            "workers_following": self._feed.followers,
            "lifecycle": msgspec.structs.asdict(self._lifecycle()),
            "sealed": config.gossip.sealed,
            "replication": self._agent.status(),
            "rejected_rows": rejected,
            "staged": self._staged(),
            "rollout": self._rollout(),
        }

    def nodes(self) -> Rows:
        """Return every node of the table or of the cluster with what membership says of it."""
        rows = {row.id: row for row in self._rows(NodeRow, "nodes")}
        members = _by_name(self._agent.members())
        nobody: Sequence[MemberView | None] = (None,)
        return [
            _describe_node(name, rows.get(name), member)
            for name in sorted(rows.keys() | members.keys())
            for member in members.get(name, nobody)
        ]

    def apps(self) -> Rows:
        """Return every app with its hosts and how many of its machines are routable."""
        fates = self._fates()
        hosts: dict[str, list[str]] = {}
        for route in self._rows(HostnameRow, "hostnames"):
            hosts.setdefault(route.app, []).append(route.hostname + route.path_prefix.rstrip("/"))
        machines: dict[str, list[str]] = {}
        for machine in self._rows(MachineRow, "machines"):
            machines.setdefault(machine.app, []).append(machine.id)
        return [
            {
                "app": app.name,
                "network": app.row.network,
                "hosts": sorted(hosts.get(app.name, ())),
                "machines": len(machines.get(app.name, ())),
                "routable": sum(
                    fates.get(machine, _NO_SERVICE).routable for machine in machines.get(app.name, ())
                ),
            }
            for app in sorted(self._table.apps(), key=lambda app: app.name)
            if app.row is not None
        ]

    def machines(self) -> Rows:
        """Return every machine with its checks and the balancer's verdict."""
        failing = self._feed.failing if self._feed is not None else {}
        return describe_machines(self._table, self._fates(), _NO_SERVICE, failing)

    def checks(self) -> Rows:
        """Return every check with its last result."""
        return describe_checks(self._table, self._last_probes(), time.time_ns() // 1_000_000)

    def routes(self) -> Rows:
        """Return every way in with the machines that requests may go to now, nearest region first."""
        fates = self._fates()
        here, rtt_ms = self._config.region, self._table.regions.rtt_ms
        machines: dict[str, list[MachineRow]] = {}
        for machine in self._rows(MachineRow, "machines"):
            if fates.get(machine.id, _NO_SERVICE).routable:
                machines.setdefault(machine.app, []).append(machine)
        for of_app in machines.values():
            of_app.sort(key=lambda machine: (rtt_ms(here, machine.region), machine.region, machine.id))
        return [
            {
                "host": host,
                "path": path,
                "app": app,
                "machines": [
                    {"machine": m.id, "region": m.region, "address": _address(m)}
                    for m in machines.get(app, ())
                ],
            }
            for host, path, app in sorted(self._table.routes())
        ]

    def regions(self) -> Rows:
        """Return every region with a node or a machine, nearest first, and how far it is from here."""
        here, known = self._config.region, self._table.regions
        fates = self._fates()
        nodes = Counter(self._table.node_regions().values())
        machines: Counter[str] = Counter()
        routable: Counter[str] = Counter()
        for target in self._table.targets():
            machines[target.region] += 1
            routable[target.region] += fates.get(target.id, _NO_SERVICE).routable
        in_order = sorted({here, *nodes, *machines}, key=lambda code: (known.rtt_ms(here, code), code))
        return [
            {
                "region": code,
                "name": region.name if (region := known.get(code)) is not None else None,
                "order": order,
                "rtt_ms": rtt_ms if math.isfinite(rtt_ms := known.rtt_ms(here, code)) else None,
                "rtt_from": known.name_source(here, code),
                "nodes": nodes[code],
                "machines": machines[code],
                "routable": routable[code],
            }
            for order, code in enumerate(in_order, 1)
        ]

    def overview(self) -> dict[str, Any]:
        """Return all of it at once, for the dashboard."""
        return {
            "status": self.status(),
            "nodes": self.nodes(),
            "apps": self.apps(),
            "machines": self.machines(),
            "routes": self.routes(),
            "regions": self.regions(),
            "traffic": self._traffic(),
        }

    def _fates(self) -> dict[str, _Fate]:
        """Return what routing makes of each machine; with several services, the best of them counts."""
        now = time.monotonic()
        fates: dict[str, _Fate] = {}
        for app in self._table.apps():
            for service in app.services.values() if app.row is not None else ():
                for target in service.targets():
                    verdict = judge(service, target, now, ANYWHERE, ())
                    fate = _Fate(
                        verdict in ROUTABLE, describe(verdict, service, target, now, self._table.ways)
                    )
                    fates[target.id] = max(fates.get(target.id, fate), fate)
        return fates

    def _rows(self, kind: type[Row], table: str) -> list[Row]:
        return [row for row in self._table.rows(table).values() if isinstance(row, kind)]


def _describe_node(name: str, row: NodeRow | None, member: MemberView | None) -> dict[str, Any]:
    is_self = bool(member and member.is_self)
    # A row says when its node started, and nobody writes there that it has ended.
    runs = member is not None and member.state in PRESENT
    return {
        "node": name,
        "region": row.region if row else None,
        "address": row.address if row else None,
        "software": row.software if row else None,
        "started_ms": row.started_ms if row and runs else None,
        "state": member.state if member else "unknown",
        "heard_ms_ago": 0 if is_self else member.heard_ms_ago if member else None,
        "rtt_ms": member.rtt_ms if member else None,
        "staleness_ms": member.staleness_ms if member else None,
        "gossip": format_address(*member.address) if member else None,
        "self": is_self,
    }


def _by_name(members: Iterable[MemberView]) -> dict[str, list[MemberView]]:
    """Return the members to show under each name: those that are there, else the one heard of last.

    A node that lost its data comes back as another member of the same name; two at once are a mistake of the
    operator, who must see both.
    """
    named: dict[str, list[MemberView]] = {}
    for member in members:
        named.setdefault(member.name, []).append(member)
    shown: dict[str, list[MemberView]] = {}
    for name, of_name in named.items():
        of_name.sort(key=lambda m: (not m.is_self, m.heard_ms_ago is None, m.heard_ms_ago or 0))
        shown[name] = [m for m in of_name if m.is_self or m.state in PRESENT] or of_name[:1]
    return shown


def _address(machine: MachineRow) -> str:
    return machine.host if machine.port is None else format_address(machine.host, machine.port)


def _readable(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
