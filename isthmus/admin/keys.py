"""The paths of the admin API for the cluster's keys.

Decides shapes and statuses only. Invariant: no key is told, only ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson
from aiohttp import web

from isthmus.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from isthmus.credentials import Credentials


class KeyRoutes:
    """Shows which keys are in use, and has the files read again."""

    def __init__(self, credentials: Credentials, replace_keys: Callable[[Sequence[bytes]], None]) -> None:
        self._credentials = credentials
        self._replace_keys = replace_keys

    def routes(self) -> list[web.RouteDef]:
        """Return the paths."""
        return [web.get("/v1/keys", self._show), web.post("/v1/reload", self._reload)]

    async def _show(self, _request: web.Request) -> web.Response:
        return _json(self._credentials.describe())

    async def _reload(self, _request: web.Request) -> web.Response:
        try:
            self._credentials.reload(self._replace_keys)
        except ConfigError as error:
            return _json({"error": str(error)}, 409)
        return _json(self._credentials.describe())


def _json(data: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(data), status=status, content_type="application/json")
