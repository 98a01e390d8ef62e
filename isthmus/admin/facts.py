"""The paths of the admin API for a doctor: what a node knows, and what its checks say of nonsense.

Decides shapes only; conclusions are drawn by who asks. Invariant: facts change nothing, and a probe sends
what checks send.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from isthmus.doctor.gather import Asker, Cluster, gather, probe, read_certificates

if TYPE_CHECKING:
    from collections.abc import Callable

    from isthmus.config import Config
    from isthmus.credentials import Credentials
    from isthmus.reloading import Lifecycle
    from routing.table import RoutingTable


class FactRoutes:
    """Tells what one node knows."""

    def __init__(
        self,
        config: Callable[[], Config],
        table: RoutingTable,
        cluster: Cluster,
        lifecycle: Callable[[], Lifecycle],
        credentials: Credentials,
        asker: Asker,
        staged: Callable[[], dict[str, Any]],
        rollouts: Callable[[], dict[str, Any]],
    ) -> None:
        self._config = config
        self._table = table
        self._cluster = cluster
        self._lifecycle = lifecycle
        self._credentials = credentials
        self._asker = asker
        self._staged = staged
        self._rollouts = rollouts

    def routes(self) -> list[web.RouteDef]:
        """Return the paths."""
        return [web.get("/v1/facts", self._show), web.post("/v1/facts/probe", self._probe)]

    async def _show(self, _request: web.Request) -> web.Response:
        config = self._config()
        certificates = await asyncio.to_thread(lambda: tuple(read_certificates(config)))
        snapshot = await gather(
            config,
            self._table,
            self._cluster,
            self._lifecycle(),
            self._credentials.problem or "",
            certificates,
            self._staged(),
            self._rollouts(),
            now=time.monotonic(),
            now_ms=time.time_ns() // 1_000_000,
        )
        return _json(snapshot)

    async def _probe(self, _request: web.Request) -> web.Response:
        return _json(await probe(self._table, self._asker, self._config().node))


def _json(data: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(data), content_type="application/json")
