"""The paths of the admin API that change how the node runs.

Decides shapes and statuses only. Invariant: what is refused has changed nothing, and says why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson
from aiohttp import web

from isthmus.role import RefusedError

if TYPE_CHECKING:
    from isthmus.role import Control


class LifecycleRoutes:
    """Has the node read its configuration again, and replace its processes."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def routes(self) -> list[web.RouteDef]:
        """Return the paths."""
        return [web.post("/v1/reload", self._reload), web.post("/v1/upgrade", self._upgrade)]

    async def _reload(self, _request: web.Request) -> web.Response:
        lifecycle = await self._control.reload()
        if lifecycle.reload_problem:
            return _json({"error": lifecycle.reload_problem}, 409)
        return _json({"changed": lifecycle.changed, "restart": lifecycle.restart})

    async def _upgrade(self, _request: web.Request) -> web.Response:
        generation = self._control.lifecycle.generation
        try:
            await self._control.upgrade()
        except RefusedError as error:
            return _json({"error": str(error)}, 409)
        return _json({"generation": generation}, 202)


def _json(data: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(data), status=status, content_type="application/json")
