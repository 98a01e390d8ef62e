"""The paths of the admin API for deploys, releases and scaling.

Decides shapes and statuses only. Invariant: a deploy is begun by one request and goes on without anybody who
looks on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
import orjson
from aiohttp import web
from msgspec import Meta

from isthmus.deploys.releases import Order, read_releases
from isthmus.registry import RegistryError

if TYPE_CHECKING:
    from isthmus.deploys.conductor import Conductor
    from isthmus.deploys.spread import Spreader
    from isthmus.registry import Database, Registry


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many machines an app is to have, over these regions; none: those that it has."""

    count: Annotated[int, Meta(ge=0, le=1_000)]
    regions: tuple[str, ...] = ()
    dry_run: bool = False


class DeployRoutes:
    """Begins, follows and cancels deploys of a node, and scales apps."""

    def __init__(
        self, database: Database, registry: Registry, conductor: Conductor, spreader: Spreader
    ) -> None:
        self._database = database
        self._registry = registry
        self._conductor = conductor
        self._spreader = spreader

    def routes(self) -> list[web.RouteDef]:
        """Return the paths."""
        return [
            web.post("/v1/deploys", self._begin),
            web.post("/v1/deploys/{app}/cancel", self._cancel),
            web.get("/v1/releases", self._list),
            web.get("/v1/releases/{app}/{version}", self._follow),
            web.post("/v1/apps/{app}/scale", self._scale),
        ]

    async def _begin(self, request: web.Request) -> web.Response:
        order = msgspec.json.decode(await request.read(), type=Order)
        release = await self._conductor.begin(order, self._registry)
        return _json(release.describe(), 202)

    async def _cancel(self, request: web.Request) -> web.Response:
        release = await self._conductor.cancel(request.match_info["app"], read_who(request))
        return _json(release.describe(), 202)

    async def _list(self, request: web.Request) -> web.Response:
        releases = await read_releases(self._database, request.query.get("app", ""))
        return _json([release.describe() for release in releases])

    async def _follow(self, request: web.Request) -> web.Response:
        version, after = request.match_info["version"], request.query.get("after", "0")
        if version == "last":
            version = "0"
        if not (version.isdecimal() and after.isdecimal() and len(version + after) < 36):
            raise RegistryError(f"`{version}` is no version", found=False)
        return _json(await self._conductor.follow(request.match_info["app"], int(version), int(after)))

    async def _scale(self, request: web.Request) -> web.Response:
        wish = msgspec.json.decode(await request.read(), type=Wish)
        app = request.match_info["app"]
        return _json(await self._spreader.scale(app, wish.count, wish.regions, dry_run=wish.dry_run))


def read_who(request: web.Request) -> str:
    """Return who asks, as the request says. Raises RegistryError."""
    by = request.query.get("by", "")
    if not (by.isascii() and by.isprintable()):
        raise RegistryError("who cancels it is told in printable ASCII")
    return by


def _json(data: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(data), status=status, content_type="application/json")
