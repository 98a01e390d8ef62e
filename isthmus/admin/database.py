"""`/v1/db/…`: the replicated database itself, for those who know what they do.

Decides how statements and values look in JSON, and which status an error has. What a query may cost is
decided by the replication agent. Invariant: nothing reaches the tables that replication keeps for itself by
way of `exec`, and a query changes nothing.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import orjson
from aiohttp import web

from isthmus.admin import tokens
from replication.core.clock import SiteId
from replication.database import QueryError
from replication.errors import BusyError, ReadOnlyError, ReplicationError, StatementError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

Value = None | int | float | str | bytes
Params = list[Value] | dict[str, Value]

# Writing there would undo what replication rests on. The name cannot be put together within SQL.
_RESERVED = re.compile(r"_repl_|sqlite_", re.IGNORECASE)
_PARKED = (
    "SELECT lower(hex(s.site)), p.version, p.reason, length(p.payload) FROM _repl_parked AS p "
    "JOIN _repl_site AS s ON s.ordinal = p.site ORDER BY p.rowid"
)
_SCHEMA = (
    "SELECT m.type, m.name, m.tbl_name, m.sql, t.mode FROM sqlite_master AS m "
    "JOIN _repl_table AS t ON t.name = m.tbl_name "
    "WHERE m.type IN ('table', 'index') AND m.sql IS NOT NULL ORDER BY m.tbl_name, m.type DESC, m.name"
)


class Replica(tokens.Replica, Protocol):
    """What is needed of the replication agent."""

    async def execute(self, statements: Sequence[tuple[str, Params]]) -> Any:
        """Run statements that write, as one transaction."""

    async def query(self, sql: str, params: Params = ()) -> Any:  # type: ignore[assignment]  # no parameters
        """Run one that reads."""

    async def retry_parked(self) -> int:
        """Try to apply what is parked; return how many changesets remain so."""

    async def drop_parked(self, site: SiteId, version: int) -> bool:
        """Give up one; return whether it was parked."""


class _NotParkedError(Exception):
    """Something else is parked, or nothing."""


class Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a query, and one statement of an exec: blobs are `{"blob": "<base64>"}`."""

    sql: str
    params: list[Any] | dict[str, Any] = []


class Exec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of an exec."""

    statements: list[Query]


class DatabaseRoutes:
    """Handlers for the paths below `/v1/db`."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def routes(self) -> list[web.RouteDef]:
        """Return path and handler of each."""
        return [
            web.get("/v1/db/schema", _answer(self._schema)),
            web.post("/v1/db/query", _answer(self._query)),
            web.post("/v1/db/exec", _answer(self._exec)),
            web.get("/v1/db/parked", _answer(self._parked)),
            web.post("/v1/db/parked/retry", _answer(self._retry_parked)),
            web.delete("/v1/db/parked/{site}/{version}", _answer(self._drop_parked)),
        ]

    async def _query(self, request: web.Request) -> Any:
        query = msgspec.json.decode(await request.read(), type=Query)
        await tokens.wait_for_write(request, self._replica)
        found = await self._replica.query(query.sql, _decode_params(query.params))
        return {
            "columns": found.columns,
            "rows": [[encode_value(value) for value in row] for row in found.rows],
        }

    async def _exec(self, request: web.Request) -> Any:
        body = msgspec.json.decode(await request.read(), type=Exec)
        for index, statement in enumerate(body.statements):
            if _RESERVED.search(statement.sql):
                raise StatementError(index, "tables named _repl_… and sqlite_… are not for exec")
        done = await self._replica.execute(
            [(statement.sql, _decode_params(statement.params)) for statement in body.statements]
        )
        return {
            "rows_affected": done.rows_affected,
            "version": done.version,
            "site": done.site.hex(),
            "token": None if done.token is None else str(done.token),
        }

    async def _parked(self, _request: web.Request) -> Any:
        found = (await self._replica.query(_PARKED)).rows
        return {
            "parked": [
                {"site": site, "version": version, "reason": reason, "bytes": size}
                for site, version, reason, size in found
            ]
        }

    async def _retry_parked(self, _request: web.Request) -> Any:
        return {"parked": await self._replica.retry_parked()}

    async def _drop_parked(self, request: web.Request) -> Any:
        site, version = request.match_info["site"], request.match_info["version"]
        try:
            was_parked = await self._replica.drop_parked(SiteId(bytes.fromhex(site)), int(version))
        except (ValueError, OverflowError):
            was_parked = False
        if not was_parked:
            raise _NotParkedError(f"version {version} of site {site} is not parked")
        return {"site": site, "version": int(version)}

    async def _schema(self, _request: web.Request) -> Any:
        tables: dict[str, dict[str, Any]] = {}
        for kind, name, table, sql, mode in (await self._replica.query(_SCHEMA)).rows:
            if kind == "table":
                tables[table] = {"name": name, "merge": mode, "sql": sql, "indexes": []}
            else:
                tables[table]["indexes"].append(sql)
        return {"tables": list(tables.values())}


def encode_value(value: Value) -> Any:
    """Return a value of SQLite as JSON can hold it."""
    if isinstance(value, bytes):
        return {"blob": base64.b64encode(value).decode()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"real": str(value)}
    return value


def decode_value(value: Any) -> Value:
    """Return the value of SQLite that JSON stands for; raises ValidationError."""
    match value:
        case bool():
            return int(value)
        case None | int() | float() | str():
            return value
        case {"blob": str(text), **rest} if not rest:
            try:
                return base64.b64decode(text, validate=True)
            except binascii.Error as error:
                raise msgspec.ValidationError(f"a blob is base64: {error}") from error
        case {"real": "inf" | "-inf" as text, **rest} if not rest:
            return float(text)
    raise msgspec.ValidationError('a parameter is null, a number, a text or {"blob": "<base64>"}')


def _decode_params(params: list[Any] | dict[str, Any]) -> Params:
    if isinstance(params, list):
        return [decode_value(value) for value in params]
    return {name: decode_value(value) for name, value in params.items()}


def _answer(
    handle: Callable[[web.Request], Awaitable[Any]],
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handler(request: web.Request) -> web.Response:
        try:
            return _json(await handle(request), 200)
        except (QueryError, _NotParkedError) as error:
            return _json({"error": str(error)}, 400 if isinstance(error, QueryError) else 404)
        except StatementError as error:
            return _json({"error": f"statement {error.index + 1}: {error}"}, 400)
        except tuple(tokens.REFUSALS):
            raise  # told alike by all routes
        except BusyError as error:
            return _json({"error": f"{error}; try again"}, 503)
        except ReadOnlyError as error:
            return _json({"error": f"this node is read-only: {error}"}, 503)
        except ReplicationError as error:
            return _json({"error": f"the database refuses it: {error}"}, 507)

    return handler


def _json(data: Any, status: int) -> web.Response:
    return web.Response(body=orjson.dumps(data) + b"\n", status=status, content_type="application/json")
