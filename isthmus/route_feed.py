"""Replicated changes become routing-table changes.

The only place where both the replicated rows and the RoutingTable are known. Invariant: whatever row comes,
the table stays usable: a row that cannot be used is counted and named, and the others take effect. Rows that
are held back (`staging`) are read as they were.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sqlite3
import time
from collections import deque
from contextlib import closing, contextmanager
from itertools import islice
from typing import TYPE_CHECKING

from isthmus.feed import ROWS_A_TURN
from replication.schema import Schema
from replication.sidetables import read_seq
from replication.staging import select_shown
from routing.catalog import load_schema_sql

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from replication.core.change import RowChange
    from routing.table import RoutingTable
    from routing.types import Pk, Row

log = logging.getLogger(__name__)

# A file that another process is checkpointing may be busy for a moment.
BUSY_TIMEOUT_S = 10.0
# What is read from the file at once while requests are served.
TURNS_AHEAD = 32
# With so many machines the collector of garbage is kept away from the table: a walk through it, now and
# then, would hold up requests for longer than anything else does.
MACHINES_WALKED_MAX = 10_000


def routing_schema() -> Schema:
    """Return the replicated schema that routing reads."""
    return Schema.parse(load_schema_sql())


class RouteFeed:
    """Keeps one RoutingTable in step with the database."""

    def __init__(self, table: RoutingTable, database: Path) -> None:
        self._table = table
        self._database = database
        self._schema = routing_schema()

    def apply(self, change: RowChange) -> None:
        """Apply one row change; tables that routing does not read are passed over."""
        self._table.apply(change.table, change.pk, change.row)

    def load(self) -> int:
        """Make the table equal to the file, and return the sequence number up to which it is.

        Reads in one transaction, so the number and the rows belong together; needs no agent. Blocks until it
        is done: for a process that does not serve yet.
        """
        # Nothing that is read is garbage, and looking for some would take longer than reading.
        gc.disable()
        try:
            with self._reading() as (seq, rows):
                self._table.load(rows)
        finally:
            gc.enable()
        if self._table.machines_count > MACHINES_WALKED_MAX:
            gc.freeze()
        return seq

    async def reload(self) -> int:
        """Do what `load` does, with pauses in which requests are served; they see the table half-way."""
        with self._reading() as (seq, rows):
            # A part at a time, of whole turns: all of a large table at once would need its memory twice.
            ahead: deque[tuple[str, Pk, Row]] = deque()

            def read_ahead() -> None:
                ahead.extend(islice(rows, TURNS_AHEAD * ROWS_A_TURN))

            def take() -> Iterator[tuple[str, Pk, Row]]:
                while ahead:
                    yield ahead.popleft()

            await asyncio.to_thread(read_ahead)
            for _ in self._table.load_in_steps(take(), ROWS_A_TURN):
                if ahead:
                    await asyncio.sleep(0)
                else:
                    await asyncio.to_thread(read_ahead)
        return seq

    @contextmanager
    def _reading(self) -> Iterator[tuple[int, Iterator[tuple[str, Pk, Row]]]]:
        """Open the file for one look at it."""
        started = time.monotonic()
        source = f"{self._database.resolve().as_uri()}?mode=ro"
        connection = sqlite3.connect(
            source, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        with closing(connection):
            connection.execute("BEGIN")
            seq = read_seq(connection)
            yield seq, self._read_rows(connection)
        log.info(
            "routing table loaded",
            extra={"seq": seq, "took_ms": round((time.monotonic() - started) * 1000)},
        )

    def _read_rows(self, connection: sqlite3.Connection) -> Iterator[tuple[str, Pk, Row]]:
        for name, table in self._schema.tables.items():
            sql, keys = select_shown(connection, table), len(table.pk)
            assert table.columns[:keys] == table.pk
            connection.text_factory = str
            try:
                for row in connection.execute(sql):
                    yield name, row[:keys], row
            except sqlite3.OperationalError as error:
                if "UTF-8" not in str(error):
                    raise
                # What is not UTF-8 is for routing to refuse, row by row, and no reason to have no table.
                # It is slow to read so; rows that come twice do no harm.
                connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
                for row in connection.execute(sql):
                    yield name, row[:keys], row
