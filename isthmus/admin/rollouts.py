"""The paths of the admin API for rollouts.

Decides shapes and statuses only. Invariant: a rollout is begun by one request and goes on without anybody who
looks on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import orjson
from aiohttp import web

from isthmus.admin.deploys import read_who
from isthmus.rollouts.keeper import Order

if TYPE_CHECKING:
    from isthmus.rollouts.keeper import Keeper


class RolloutRoutes:
    """Begins, shows and ends rollouts."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def routes(self) -> list[web.RouteDef]:
        """Return the paths."""
        return [
            web.post("/v1/rollouts", self._begin),
            web.get("/v1/rollouts", self._list),
            web.get("/v1/rollouts/{rollout}", self._show),
            web.post("/v1/rollouts/{rollout}/cancel", self._cancel),
            web.post("/v1/rollouts/{rollout}/retry", self._retry),
        ]

    async def _begin(self, request: web.Request) -> web.Response:
        order = msgspec.json.decode(await request.read(), type=Order)
        return _json(await self._keeper.begin(order), 200 if order.dry_run else 202)

    async def _list(self, _request: web.Request) -> web.Response:
        return _json(await self._keeper.list())

    async def _show(self, request: web.Request) -> web.Response:
        return _json(await self._keeper.show(request.match_info["rollout"]))

    async def _cancel(self, request: web.Request) -> web.Response:
        return _json(await self._keeper.cancel(request.match_info["rollout"], read_who(request)), 202)

    async def _retry(self, request: web.Request) -> web.Response:
        return _json(await self._keeper.retry(request.match_info["rollout"]), 202)


def _json(data: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(data), status=status, content_type="application/json")
