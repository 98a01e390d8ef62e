"""The paths of the admin API that explain: a request that might come, or one that will be made.

Decides shapes and statuses only. Invariant: nothing is changed, and no key leaves the node, only proofs that
are good for one host and a short time.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import msgspec
import orjson
from aiohttp import web
from msgspec import Meta, Struct

from isthmus.credentials import compute_explain_keys
from isthmus.explanation import Question, QuestionError, Sources, explain
from proxy.core.explain_proof import FIELD, TTL_S_MAX, make_proof
from proxy.core.request_head import is_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from isthmus.config import Config
    from isthmus.credentials import Credentials
    from replication.report import MemberView
    from routing.table import RoutingTable


class Wish(Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /v1/explain/proof`."""

    host: str
    ttl_s: Annotated[int, Meta(ge=1, le=TTL_S_MAX)] = 300


class Cluster(Protocol):
    """What is needed of the replication agent."""

    def members(self) -> Iterable[MemberView]:
        """Return all nodes that it knows of."""


class Feed(Protocol):
    """What is needed of the way to the workers."""

    @property
    def failing(self) -> Mapping[str, Iterable[tuple[str, int, float]]]:
        """What each worker leaves out: machine, failures in a row, seconds that are left of it."""


class ExplainRoutes:
    """Explains by the table of this node."""

    def __init__(
        self,
        config: Callable[[], Config],
        table: RoutingTable,
        cluster: Cluster,
        feed: Feed,
        credentials: Credentials,
    ) -> None:
        self._config = config
        self._table = table
        self._cluster = cluster
        self._feed = feed
        self._credentials = credentials

    def routes(self) -> list[web.RouteDef]:
        """Return the paths."""
        return [
            web.get("/v1/explain", self._get),
            web.post("/v1/explain", self._post),
            web.post("/v1/explain/proof", self._prove),
        ]

    async def _get(self, request: web.Request) -> web.Response:
        query = request.query
        lines = tuple(query.getall("header", []))
        question = Question(query.get("url", ""), query.get("method", "GET"), lines, query.get("from", ""))
        return self._explain(question)

    async def _post(self, request: web.Request) -> web.Response:
        return self._explain(msgspec.json.decode(await request.read(), type=Question))

    def _explain(self, question: Question) -> web.Response:
        # Importing here keeps the data plane, 2 MB, out of agents that nobody asks.
        from isthmus.worker_role import proxy_settings  # noqa: PLC0415 — see above

        staleness = {member.name: member.staleness_ms for member in self._cluster.members()}
        sources = Sources(
            proxy_settings(self._config()),
            staleness,
            self._feed.failing,
            now=time.monotonic(),
            now_ms=time.time_ns() // 1_000_000,
        )
        try:
            return _json(explain(question, self._table, sources))
        except QuestionError as error:
            return _json({"error": str(error)}, 400)

    async def _prove(self, request: web.Request) -> web.Response:
        wish = msgspec.json.decode(await request.read(), type=Wish)
        host = wish.host.encode()
        if not is_host(host):
            return _json({"error": f"`{wish.host}` is no host"}, 400)
        keys = compute_explain_keys(self._credentials.keys, self._config().admin.token)
        if not keys:
            problem = (
                "there is nothing to sign with: set gossip.keys (`isthmus key` makes one), or admin.token"
            )
            return _json({"error": problem}, 409)
        expires_s = int(time.time()) + wish.ttl_s
        name = FIELD.decode().title()
        value = make_proof(keys[0], host, expires_s)
        return _json({"header": name, "value": value, "expires_ms": expires_s * 1000})


def _json(data: Any, status: int = 200) -> web.Response:
    body = orjson.dumps(data, option=orjson.OPT_INDENT_2) + b"\n"
    return web.Response(body=body, status=status, content_type="application/json")
