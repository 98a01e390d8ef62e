"""The admin listener: JSON API, metrics and dashboard on aiohttp.

Decides which path does what and how a refusal looks. What is shown comes from `views`, what is changed
goes to the registry. Invariant: a request that changes something is a POST or DELETE.
"""

from __future__ import annotations

import logging
from importlib import resources
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec
import orjson
from aiohttp import web

from isthmus.admin.database import DatabaseRoutes, Replica
from isthmus.admin.guard import make_guard
from isthmus.admin.metrics import expose
from isthmus.admin.schema import Extensible, SchemaRoutes
from isthmus.admin.subscriptions import SubscriptionRoutes
from isthmus.admin.tokens import answer_refusals
from isthmus.config import AdminConfig, AppConfig, format_address, parse_listen
from isthmus.registry import ACTIONS, NewMachine, Registry, RegistryError
from replication.errors import BusyError, ReadOnlyError, StoreError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from aiohttp.typedefs import Handler

    from isthmus.admin.keys import KeyRoutes
    from isthmus.admin.lifecycle import LifecycleRoutes
    from isthmus.admin.views import Views
    from replication.metrics import Sample
    from replication.subscriptions import Subscriptions

log = logging.getLogger(__name__)

Body = TypeVar("Body")

# The page brings everything with it, talks to this node alone, and is shown in no frame, where another page
# could steal a click on `stop`.
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)

# Bodies are small JSON objects; an app with a thousand machines fits.
BODY_BYTES_MAX = 1 << 20


def _json(data: Any, status: int = 200) -> web.Response:
    body = orjson.dumps(data, option=orjson.OPT_INDENT_2) + b"\n"
    return web.Response(body=body, status=status, content_type="application/json")


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every failure with JSON that says what to do."""
    try:
        return await handler(request)
    except RegistryError as error:
        return _json({"error": str(error)}, 409 if error.found else 404)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        return _json({"error": str(error)}, 400)
    except (BusyError, StoreError) as error:
        match error:
            case BusyError():
                problem = f"{error}; try again"
            case ReadOnlyError():
                problem = f"this node is read-only: {error}"
            case _:
                problem = f"the database refuses: {error}"
        log.warning("a change was not made", extra={"path": request.path, "problem": problem})
        return _json({"error": problem}, 503)
    except web.HTTPException as error:
        return _json({"error": f"{error.reason}: {request.method} {request.path}"}, error.status)
    except Exception:
        log.exception("an admin request failed", extra={"path": request.path})
        return _json({"error": "internal error; the log of this node says more"}, 500)


class Agent(Replica, Extensible, Protocol):
    """What is needed of the replication agent, by all routes together."""


class Routes(Protocol):
    """Paths that belong together."""

    def routes(self) -> list[web.RouteDef]:
        """Return the paths."""


class AdminServer:
    """Serves one node's admin API. `address` is set by `start`."""

    def __init__(
        self,
        config: AdminConfig,
        views: Views,
        registry: Registry,
        samples: Callable[[], Iterable[Sample]],
        replica: Agent,
        subscriptions: Subscriptions,
        keys: KeyRoutes,
        lifecycle: LifecycleRoutes,
        *,
        others: Iterable[Routes] = (),
    ) -> None:
        self._config = config
        self._views = views
        self._registry = registry
        self._samples = samples
        self._database = DatabaseRoutes(replica)
        self._schema = SchemaRoutes(replica, subscriptions)
        self._subscriptions = SubscriptionRoutes(subscriptions, replica)
        self._keys = keys
        self._lifecycle = lifecycle
        self._others = tuple(others)
        self._runner: web.AppRunner | None = None
        self.address = config.listen

    async def start(self) -> None:
        """Listen. Raises OSError when the address cannot be had."""
        middlewares = [make_guard(self._config.token), _errors, answer_refusals]
        app = web.Application(middlewares=middlewares, client_max_size=BODY_BYTES_MAX)
        app.add_routes(self._routes())
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        host, port = parse_listen(self._config.listen)
        await web.TCPSite(self._runner, host, port, reuse_address=True).start()
        bound = self._runner.addresses[0]
        self.address = format_address(host, bound[1])

    async def stop(self) -> None:
        """Close the listener and its connections."""
        if self._runner is not None:
            await self._runner.cleanup()

    def _routes(self) -> list[web.RouteDef]:
        views = self._views
        return [
            web.get("/", self._dashboard),
            web.get("/healthz", self._health),
            web.get("/metrics", self._metrics),
            web.get("/v1/status", _show(views.status)),
            web.get("/v1/nodes", _show(views.nodes)),
            web.get("/v1/apps", _show(views.apps)),
            web.get("/v1/machines", _show(views.machines)),
            web.get("/v1/checks", _show(views.checks)),
            web.get("/v1/routes", _show(views.routes)),
            web.get("/v1/regions", _show(views.regions)),
            web.get("/v1/overview", _show(views.overview)),
            web.post("/v1/apps", self._add_app),
            web.post("/v1/apps/{app}/options", self._set_options),
            web.delete("/v1/apps/{app}", self._remove_app),
            web.post("/v1/machines", self._add_machine),
            web.delete("/v1/machines/{machine}", self._remove_machine),
            web.post("/v1/machines/{machine}/{action}", self._change_machine),
            *self._database.routes(),
            *self._schema.routes(),
            *self._subscriptions.routes(),
            *self._keys.routes(),
            *self._lifecycle.routes(),
            *(route for group in self._others for route in group.routes()),
        ]

    async def _dashboard(self, _request: web.Request) -> web.Response:
        page = resources.files("isthmus.admin").joinpath("static/dashboard.html").read_text("utf-8")
        headers = {"Content-Security-Policy": _PAGE_POLICY}
        return web.Response(text=page, content_type="text/html", headers=headers)

    async def _health(self, _request: web.Request) -> web.Response:
        return _json({"ok": True})

    async def _metrics(self, _request: web.Request) -> web.Response:
        body, content_type = expose(self._samples())
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _add_app(self, request: web.Request) -> web.Response:
        app = await _body(request, AppConfig)
        exact, dry_run = (request.query.get(flag) == "1" for flag in ("exact", "dry_run"))
        changes, hosts = await self._registry.compare_app(app) if exact or dry_run else ([], [])
        machines = await self._registry.add_app(app, exact=exact, dry_run=dry_run)
        warnings = await self._registry.doubt_primary_region(app.primary_region)
        answer: dict[str, Any] = {"app": app.name, "machines": machines, "warnings": warnings}
        if exact or dry_run:
            answer |= {"changes": changes, "hosts": hosts}
        return _json(answer, 200 if dry_run else 201)

    async def _set_options(self, request: web.Request) -> web.Response:
        name = request.match_info["app"]
        changes = await _body(request, dict[str, Any])
        await self._registry.set_options(name, changes)
        warnings = await self._registry.doubt_primary_region(changes.get("primary_region"))
        return _json({"app": name, "warnings": warnings})

    async def _remove_app(self, request: web.Request) -> web.Response:
        name = request.match_info["app"]
        await self._registry.remove_app(name)
        return _json({"removed": name})

    async def _add_machine(self, request: web.Request) -> web.Response:
        machine = await self._registry.add_machine(await _body(request, NewMachine))
        return _json({"machine": machine}, 201)

    async def _remove_machine(self, request: web.Request) -> web.Response:
        machine = request.match_info["machine"]
        await self._registry.remove_machine(machine)
        return _json({"removed": machine})

    async def _change_machine(self, request: web.Request) -> web.Response:
        machine, action = request.match_info["machine"], request.match_info["action"]
        if action not in ACTIONS:
            return _json({"error": f"`{action}` is no action; there are {', '.join(ACTIONS)}"}, 404)
        asked = await self._registry.change_machine(machine, action)
        return _json({"machine": machine, "done": action, "asked": asked})


def _show(view: Callable[[], Any]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handler(_request: web.Request) -> web.Response:
        return _json(view())

    return handler


async def _body(request: web.Request, kind: type[Body]) -> Body:
    return msgspec.json.decode(await request.read(), type=kind)
