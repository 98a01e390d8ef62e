"""Subscriptions over HTTP, in the shapes of Corrosion's API: one JSON value per line.

Decides how a statement is read from a body and how events look on the wire. What is subscribed to, shared and
kept is decided in `replication.subscriptions`. Invariant: a stream that ends although its node goes on ends
with a line that says why.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import msgspec
import orjson
from aiohttp import web

from isthmus.admin import tokens
from replication.core.subscription import unpack_cells
from replication.database import QueryError
from replication.subscriptions import (
    SubscriptionError,
    TooManyError,
    UnknownSubscriptionError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from replication.core.change import SqlValue
    from replication.core.subscription import Change
    from replication.database import Params
    from replication.subscriptions import Listener, Subscription, Subscriptions

# How much is gathered before it is written: large enough to share the cost, small enough not to matter.
_WRITE_BYTES: Final = 64 * 1024
# How long a client may take nothing at all of what was written to it.
_STALL_S: Final = 30.0
# How often a stream on which nothing happens looks whether its client is still there.
_LOOK_S: Final = 5.0
HEARTBEAT_MS_MIN: Final = 100
_INT64 = range(-(2**63), 2**63)


class StatementError(ValueError):
    """A body that is no statement; the message is for the client."""


def read_statement(body: bytes) -> tuple[str, Params]:
    """Return SQL and parameters of any of the four forms of a statement; raises StatementError."""
    try:
        found = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        raise StatementError(str(error)) from error
    values: Any = None
    match found:
        case str(sql):
            pass
        case [str(sql)]:
            pass
        case [str(sql), list() | dict() as values]:
            pass
        case {"query": str(sql), **rest} if not rest.keys() - {"params", "named_params"}:
            values, named = rest.get("params"), rest.get("named_params")
            if values and named:
                raise StatementError("`params` and `named_params` exclude each other")
            values = values or named
        case _:
            raise StatementError(
                'not a statement: give "SELECT …", ["SELECT … ?", [1]], ["SELECT … :id", {":id": 1}] or '
                '{"query": "SELECT … ?", "params": [1]}'
            )
    if values is None:
        return sql, ()
    if isinstance(values, list):
        return sql, tuple(map(_read_value, values))
    if not isinstance(values, dict):
        raise StatementError("parameters are an array or an object")
    for name in values:
        if name[:1] not in (":", "@", "$"):
            raise StatementError(f"`{name}` lacks the sign that it has in the statement, as in `:{name}`")
    return sql, {name[1:]: _read_value(value) for name, value in values.items()}


def _read_value(value: Any) -> SqlValue:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int) and value not in _INT64:
        raise StatementError(f"{value} is beyond 64 bits")
    if value is None or isinstance(value, (int, float, str)):
        return value
    if isinstance(value, list) and all(type(item) is int and 0 <= item <= 255 for item in value):
        return bytes(value)
    return orjson.dumps(value).decode()


def _encode(value: Any) -> bytes:
    return orjson.dumps(value, default=list) + b"\n"  # a blob is an array of its bytes


def encode_start(
    subscription: Subscription, rows: Iterable[tuple[int, bytes]], last_id: int
) -> Iterator[bytes]:
    """Yield the lines of a first answer: columns, rows, and the end with the number of the last change."""
    yield _encode({"columns": subscription.columns})
    for row_id, cells in rows:
        yield _encode({"row": (row_id, unpack_cells(cells))})
    yield _encode({"eoq": {"time": subscription.took_ms / 1000, "change_id": last_id}})


def encode_change(change: Change) -> bytes:
    """Return the line of a change."""
    return _encode({"change": (change.kind.value, change.row_id, unpack_cells(change.cells), change.id)})


def _answer_error(error: Exception) -> web.Response:
    if isinstance(error, UnknownSubscriptionError):
        status = 404
    elif isinstance(error, TooManyError):
        status = 503
    else:
        status = 400
    return web.json_response({"error": str(error)}, status=status)


class SubscriptionRoutes:
    """The routes of subscriptions."""

    def __init__(self, subscriptions: Subscriptions, replica: tokens.Replica) -> None:
        self._subscriptions = subscriptions
        self._replica = replica

    def routes(self) -> list[web.RouteDef]:
        """Return what to add to the application."""
        return [
            web.get("/v1/subscriptions", self._list),
            web.post("/v1/subscriptions", _refusing(self._subscribe)),
            web.get("/v1/subscriptions/{id}", _refusing(self._attach)),
        ]

    async def _list(self, _request: web.Request) -> web.Response:
        body = orjson.dumps(self._subscriptions.describe(), option=orjson.OPT_INDENT_2) + b"\n"
        return web.Response(body=body, content_type="application/json")

    async def _subscribe(self, request: web.Request) -> web.StreamResponse:
        sql, params = read_statement(await request.read())
        options = _Options(request)
        await tokens.wait_for_write(request, self._replica)
        if options.from_id is None:
            subscription = await self._subscriptions.subscribe(sql, params)
        else:
            found = self._subscriptions.find(sql, params)
            if found is None:
                raise SubscriptionError(
                    "a `from` query param was supplied, but no existing subscription found"
                )
            subscription = found
        return await self._stream(request, subscription, options)

    async def _attach(self, request: web.Request) -> web.StreamResponse:
        subscription = self._subscriptions.get(request.match_info["id"])
        return await self._stream(request, subscription, _Options(request))

    async def _stream(
        self, request: web.Request, subscription: Subscription, options: _Options
    ) -> web.StreamResponse:
        with self._subscriptions.listen(
            subscription, from_id=options.from_id, skip_rows=options.skip_rows
        ) as listener:
            response = web.StreamResponse(
                headers={
                    "Content-Type": "application/x-ndjson",
                    "Cache-Control": "no-store",
                    "X-Content-Type-Options": "nosniff",
                    "corro-query-id": subscription.id,
                    "corro-query-hash": subscription.hash,
                }
            )
            await response.prepare(request)
            try:
                try:
                    if options.from_id is None and not options.skip_rows:
                        await _write_start(response, listener)
                    await _write_changes(request, response, listener, options.heartbeat_s)
                except SubscriptionError as error:
                    await _write(response, _encode({"error": str(error)}))
            except TimeoutError:
                if request.transport is not None:
                    request.transport.abort()  # what waits in it will never be taken
            except ConnectionError:
                pass  # the client has gone, which is how most streams end
        return response


class _Options:
    """What the query string asks for. Raises StatementError."""

    def __init__(self, request: web.Request) -> None:
        query = request.query
        # Corrosion takes 0 as nothing given.
        self.from_id = _read_number("from", query.get("from", "0")) or None
        self.skip_rows = query.get("skip_rows", "false") == "true"
        heartbeat_ms = _read_number("heartbeat_ms", query.get("heartbeat_ms", "0"))
        self.heartbeat_s = max(heartbeat_ms, HEARTBEAT_MS_MIN) / 1000 if heartbeat_ms else None


def _read_number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise StatementError(f"`{name}` is not a number: {text[:40]!r}")
    return int(text)


def _refusing(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Answer what is refused before the stream begins."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except (StatementError, QueryError, SubscriptionError) as error:
            return _answer_error(error)

    return handle


async def _write(response: web.StreamResponse, data: bytes) -> None:
    """Write and wait until the client has taken most of what is on the way; raises TimeoutError."""
    async with asyncio.timeout(_STALL_S):
        await response.write(data)


async def _write_start(response: web.StreamResponse, listener: Listener) -> None:
    buffer = bytearray()
    for line in encode_start(listener.subscription, listener.rows, listener.last_id):
        buffer += line
        if len(buffer) >= _WRITE_BYTES:
            await _write(response, bytes(buffer))
            buffer.clear()
    listener.rows.clear()
    await _write(response, bytes(buffer))


async def _write_changes(
    request: web.Request, response: web.StreamResponse, listener: Listener, heartbeat_s: float | None
) -> None:
    """Write changes until the client, the subscription or the node ends."""
    while True:
        changes = await listener.read(_LOOK_S if heartbeat_s is None else heartbeat_s)
        if changes is None:
            return
        if request.transport is None or request.transport.is_closing():
            return
        if changes:
            await _write(response, b"".join(map(encode_change, changes)))
        elif heartbeat_s is not None:
            await _write(response, _encode({"heartbeat": {"change_id": listener.last_id}}))
