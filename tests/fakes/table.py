"""A database whose every change is taken up by a RoutingTable and told, as the agent's are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from replication.core.change import Commit, RowChange
from routing.catalog import TABLES
from routing.table import RoutingTable
from tests.fakes.database import FakeDatabase

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from isthmus.registry import Statement, Value
    from routing.types import Pk, Row


class TableDatabase(FakeDatabase):
    """`on_commit` is called with each commit that changes rows, after `table` has taken it up."""

    def __init__(self, node: str = "n1") -> None:
        super().__init__()
        self.table = RoutingTable(node)
        self.on_commit: Callable[[Commit], None] = lambda _: None
        self._seen: dict[tuple[str, Pk], Row] = {}
        self._seq = 0

    async def execute(self, statements: Sequence[Statement]) -> None:
        await super().execute(statements)
        self._publish()

    def put(self, table: str, **columns: Value) -> None:
        super().put(table, **columns)
        self._publish()

    def drop(self, table: str, **key: Value) -> None:
        """Delete the rows with these values."""
        where = " AND ".join(f"{column} = ?" for column in key)
        self.connection.execute(f"DELETE FROM {table} WHERE {where}", tuple(key.values()))
        self._publish()

    def _publish(self) -> None:
        now: dict[tuple[str, Pk], Row] = {}
        for name, spec in TABLES.items():
            for row in self.connection.execute(f"SELECT * FROM {name}"):
                now[name, row[: spec.pk]] = row
        changes = [RowChange(*key, row) for key, row in now.items() if self._seen.get(key) != row]
        changes += [RowChange(*key, None) for key in self._seen.keys() - now.keys()]
        self._seen = now
        if changes:
            self._seq += 1
            for change in changes:
                self.table.apply(*change)
            self.on_commit(Commit(self._seq, tuple(changes), ()))
