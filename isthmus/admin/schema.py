"""`POST /v1/db/schema`: tables, columns and indexes that are added while the node runs.

Decides what is answered. What may be added is decided by the replica: whatever takes a plan is refused here.
Invariant: what is answered with 200 is in the database, with the text of the schema file that declares it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec
import orjson
from aiohttp import web

from isthmus.declared import combine_schema
from replication.errors import SchemaError

if TYPE_CHECKING:
    from replication.schema import Schema


class Extensible(Protocol):
    """What is needed of the replication agent."""

    async def extend(self, schema: Schema, declared: str) -> None:
        """Take up what a schema has beyond the present one."""


class Readers(Protocol):
    """What is needed of those who know the tables as well."""

    def extend(self, schema: Schema) -> None:
        """Read the tables of this schema from now on."""


class Declaration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body: the text of a schema file, with all tables that are the operator's own."""

    sql: str


class SchemaRoutes:
    """The handler of the path."""

    def __init__(self, replica: Extensible, readers: Readers) -> None:
        self._replica = replica
        self._readers = readers

    def routes(self) -> list[web.RouteDef]:
        """Return path and handler."""
        return [web.post("/v1/db/schema", self._extend)]

    async def _extend(self, request: web.Request) -> web.Response:
        declared = msgspec.json.decode(await request.read(), type=Declaration).sql
        try:
            schema = combine_schema(declared)
            await self._replica.extend(schema, declared)
        except SchemaError as error:
            return web.json_response({"error": str(error)}, status=400)
        self._readers.extend(schema)
        tables = orjson.dumps({"tables": sorted(schema.tables)}) + b"\n"
        return web.Response(body=tables, content_type="application/json")
