"""`/v1/staged`: changes that are held back from workers, and what a person decides about them.

Decides the shape of the answers only. Invariant: what is refused has changed nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from isthmus.staging.keeper import StagingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from isthmus.staging.keeper import Keeper
    from replication.report import MemberView


class StagingRoutes:
    """Shows what is held back, and releases or drops it."""

    def __init__(self, keeper: Keeper, members: Callable[[], Iterable[MemberView]]) -> None:
        self._keeper = keeper
        self._members = members

    def routes(self) -> list[web.RouteDef]:
        """Return the paths."""
        return [
            web.get("/v1/staged", self._show),
            web.post("/v1/staged/{change}/release", self._release),
            web.post("/v1/staged/{change}/drop", self._drop),
        ]

    async def _show(self, _request: web.Request) -> web.Response:
        names = {member.site: member.name for member in self._members()}
        shown = self._keeper.describe()
        for change in shown["changes"]:
            change["writer"] = names.get(change["site"])
        return _answer(shown)

    async def _release(self, request: web.Request) -> web.Response:
        change = request.match_info["change"]
        try:
            await self._keeper.release(change)
        except StagingError as error:
            return _refuse(error)
        return _answer({"released": change})

    async def _drop(self, request: web.Request) -> web.Response:
        change = request.match_info["change"]
        try:
            rows = await self._keeper.drop(change)
        except StagingError as error:
            return _refuse(error)
        return _answer({"dropped": change, "rows": rows})


def _answer(data: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(data) + b"\n", status=status, content_type="application/json")


def _refuse(error: StagingError) -> web.Response:
    return _answer({"error": str(error)}, 409 if error.found else 404)
