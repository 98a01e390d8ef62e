"""What the admin API shows: the table as this node sees it, and how old that is.

Decides the shape of each answer. Changes nothing. Invariant: what is shown as routable is what the balancer
of this node would consider now, because the balancer is asked.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from isthmus import __version__
from isthmus.config import format_address
from routing.balancer import ANYWHERE
from routing.explain import Verdict, describe, judge

if TYPE_CHECKING:
    from isthmus.config import Config
    from isthmus.feed import FeedServer
    from replication.agent import Agent
    from routing.table import RoutingTable

Rows = list[dict[str, Any]]

# What the balancer may say of a machine that takes requests.
ROUTABLE = frozenset({Verdict.CANDIDATE, Verdict.OVER_SOFT})


class _Fate(NamedTuple):
    """What becomes of a machine in routing, and why."""

    routable: bool
    why: str


_NO_SERVICE = _Fate(routable=False, why="its app has no service")


class Views:
    """Reads the database for what is there, and asks routing what it makes of it."""

    def __init__(self, config: Config, agent: Agent, table: RoutingTable, feed: FeedServer) -> None:
        self._config = config
        self._agent = agent
        self._table = table
        self._feed = feed

    async def status(self) -> dict[str, Any]:
        """Return the node, its replication state, and rows that could not be used."""
        config = self._config
        rejected = [
            {"table": table, "key": [str(part) for part in key], "reason": reason}
            for (table, key), reason in self._table.rejected.items()
        ]
        return {
            "node": config.node,
            "region": config.region,
            "software": f"isthmus {__version__}",
            "workers": config.workers,
            "agent_pid": os.getpid(),
            "workers_following": self._feed.followers,
            "sealed": bool(config.gossip.keys),
            "replication": self._agent.status(),
            "rejected_rows": rejected,
        }

    async def nodes(self) -> Rows:
        """Return every node of the table with what membership says of it."""
        members = {member.name: member for member in self._agent.members()}
        nodes = await self._rows(
            "SELECT id AS node, region, address, software, started_ms FROM nodes ORDER BY id"
        )
        for node in nodes:
            member = members.pop(node["node"], None)
            node["state"] = member.state if member else "unknown"
            node["heard_ms_ago"] = 0 if member and member.is_self else member.heard_ms_ago if member else None
            node["rtt_ms"] = member.rtt_ms if member else None
            node["gossip"] = format_address(*member.address) if member else None
            node["self"] = bool(member and member.is_self)
        return nodes

    async def apps(self) -> Rows:
        """Return every app with its hosts and how many of its machines are routable."""
        fates = self._fates()
        apps = await self._rows("SELECT name AS app, network FROM apps ORDER BY name")
        hosts = await self._rows(
            "SELECT app, hostname, path_prefix FROM hostnames ORDER BY hostname, path_prefix"
        )
        machines = await self._rows("SELECT id, app FROM machines")
        for app in apps:
            app["hosts"] = [
                h["hostname"] + h["path_prefix"].rstrip("/") for h in hosts if h["app"] == app["app"]
            ]
            own = [m["id"] for m in machines if m["app"] == app["app"]]
            app["machines"] = len(own)
            app["routable"] = sum(fates.get(machine, _NO_SERVICE).routable for machine in own)
        return apps

    async def machines(self) -> Rows:
        """Return every machine with its checks and the balancer's verdict."""
        fates = self._fates()
        machines = await self._rows(
            "SELECT id AS machine, app, region, node, address, state, cordoned FROM machines"
            " ORDER BY app, region, id"
        )
        checks = await self._rows(
            "SELECT machine, name, status, output, updated_ms FROM checks ORDER BY name"
        )
        by_machine: dict[str, Rows] = {}
        for check in checks:
            by_machine.setdefault(check.pop("machine"), []).append(check)
        for machine in machines:
            machine["cordoned"] = bool(machine["cordoned"])
            machine["checks"] = by_machine.get(machine["machine"], [])
            fate = fates.get(machine["machine"], _NO_SERVICE)
            machine["routable"], machine["verdict"] = fate
        return machines

    async def routes(self) -> Rows:
        """Return every way in with the machines that requests may go to now, nearest region first."""
        fates = self._fates()
        routes = await self._rows(
            "SELECT h.hostname AS host, h.path_prefix AS path, h.app, m.id AS machine, m.region, m.address"
            " FROM hostnames h LEFT JOIN machines m ON m.app = h.app ORDER BY h.hostname, h.path_prefix, m.id"
        )
        here, distance_km = self._config.region, self._table.regions.distance_km
        shown: dict[tuple[str, str], dict[str, Any]] = {}
        for route in routes:
            way = {"host": route["host"], "path": route["path"], "app": route["app"], "machines": []}
            entry = shown.setdefault((route["host"], route["path"]), way)
            if fates.get(route["machine"], _NO_SERVICE).routable:
                entry["machines"].append({key: route[key] for key in ("machine", "region", "address")})
        for entry in shown.values():
            entry["machines"].sort(key=lambda m: (distance_km(here, m["region"]), m["machine"]))
        return list(shown.values())

    async def overview(self) -> dict[str, Any]:
        """Return all of it at once, for the dashboard."""
        return {
            "status": await self.status(),
            "nodes": await self.nodes(),
            "apps": await self.apps(),
            "machines": await self.machines(),
            "routes": await self.routes(),
        }

    def _fates(self) -> dict[str, _Fate]:
        """Return what routing makes of each machine; with several services, the best of them counts."""
        now = time.monotonic()
        fates: dict[str, _Fate] = {}
        for app in self._table.apps():
            for service in app.services.values() if app.row is not None else ():
                for target in service.targets():
                    verdict = judge(service, target, now, ANYWHERE, ())
                    fate = _Fate(verdict in ROUTABLE, describe(verdict, service, target, now))
                    fates[target.id] = max(fates.get(target.id, fate), fate)
        return fates

    async def _rows(self, sql: str) -> Rows:
        answer = await self._agent.query(sql)
        return [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
