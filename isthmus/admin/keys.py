"""The paths of the admin API for the cluster's keys.

Decides the shape of the answer only. Invariant: no key is told, only ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson
from aiohttp import web

if TYPE_CHECKING:
    from isthmus.credentials import Credentials


class KeyRoutes:
    """Shows which keys are in use."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def routes(self) -> list[web.RouteDef]:
        """Return the paths."""
        return [web.get("/v1/keys", self._show)]

    async def _show(self, _request: web.Request) -> web.Response:
        body = orjson.dumps(self._credentials.describe())
        return web.Response(body=body, content_type="application/json")
