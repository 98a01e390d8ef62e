"""Nodes in several regions, in virtual time: real stores and keepers, workers that die of what they are told.

A worker here is a routing table. What kills is a row of `services` with a soft limit of POISON.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from isthmus.config import StagingConfig
from isthmus.declared import combine_schema
from isthmus.route_feed import RouteFeed
from isthmus.staging.keeper import STAGED, Keeper
from replication.core.change import Commit, RowChange
from replication.store import Store
from routing.table import RoutingTable
from tests.fakes.database import Answer

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from isthmus.registry import Statement
    from replication.core.change import EncodedChangeset
    from replication.core.clock import Clock
    from replication.staging import Staged

POISON = 666
STEP_MS = 50
LINK_MS = 100
RESTART_MS = 500


class _DiedError(Exception):
    """A worker has taken up what kills."""


class _MortalTable(RoutingTable):
    def apply(self, table: str, pk: Any, row: Any) -> None:
        if table == "services" and row is not None and row[4] == POISON:
            raise _DiedError
        super().apply(table, pk, row)

    def load_in_steps(self, rows: Any, size: int) -> Any:
        found = list(rows)
        if any(table == "services" and row[4] == POISON for table, _, row in found):
            raise _DiedError
        return super().load_in_steps(iter(found), size)

    def load(self, rows: Any) -> None:
        for _ in self.load_in_steps(rows, 1_000):
            pass


@dataclass
class World:
    """All nodes, and what is on its way between them."""

    directory: Path
    bake_ms: int = 4_000
    regions: tuple[str, ...] = ()
    now_ms: int = 1_700_000_000_000
    nodes: list[Node] = field(default_factory=list)
    flying: list[tuple[int, Node, EncodedChangeset]] = field(default_factory=list)

    def add(self, name: str, region: str, workers: int = 2) -> Node:
        node = Node(self, name, region, workers)
        self.nodes.append(node)
        return node

    def spread(self, sender: Node, commit: Commit) -> None:
        for changeset in commit.changesets:
            if changeset.site == sender.store.site:
                self.flying += [
                    (self.now_ms + LINK_MS, node, changeset) for node in self.nodes if node is not sender
                ]

    async def advance(self, ms: int) -> None:
        until_ms = self.now_ms + ms
        while self.now_ms < until_ms:
            self.now_ms += STEP_MS
            landing = [item for item in self.flying if item[0] <= self.now_ms]
            self.flying = [item for item in self.flying if item[0] > self.now_ms]
            for _, node, changeset in landing:
                node.take(node.store.apply([changeset], self.now_ms).commit)
            for node in self.nodes:
                await node.step()

    def deaths(self) -> dict[str, int]:
        return {node.name: node.deaths for node in self.nodes}

    def limits(self) -> dict[str, set[int | None]]:
        """The soft limit of the app `web` as each node's workers have it."""
        return {node.name: {node.limit(table) for table in node.workers.values()} for node in self.nodes}

    def close(self) -> None:
        for node in self.nodes:
            node.store.close()


class Node:
    """One node: store, keeper, and workers that come back."""

    def __init__(self, world: World, name: str, region: str, workers: int) -> None:
        self.world = world
        self.name = name
        self.region = region
        self.file = world.directory / f"{name}.db"
        self.store = Store.open(self.file, combine_schema(""), staged=STAGED)
        self.deaths = 0
        self.workers: dict[str, RoutingTable] = {}
        self.coming: list[int] = [0] * workers  # when each of those that are away is back
        self.sent: list[tuple[str | None, list[Any]]] = []
        self.failures: list[Exception] = []  # raised by the next writes of the keeper, one each
        self._started = 0
        self.boot()

    def boot(self) -> None:
        """Begin, or begin again after a crash of the agent's process."""
        world = self.world
        self.keeper = Keeper(
            self,
            StagingConfig(bake_ms=world.bake_ms, regions=world.regions),
            lambda: {node.region for node in world.nodes},
            node=self.name,
            region=self.region,
            now_ms=lambda: world.now_ms,
            wall_ms=lambda: world.now_ms,
        )
        empty = not self.store.connection.execute("SELECT 1 FROM apps").fetchone()
        self.keeper.prepare(self, is_empty=empty)

    def crash(self) -> None:
        """All processes of the node end, and start again."""
        self.coming += [self.world.now_ms + RESTART_MS] * len(self.workers)
        self.workers.clear()
        self.store.close()
        self.store = Store.open(self.file, combine_schema(""), staged=STAGED)
        self.boot()

    async def step(self) -> None:
        for at_ms in [at_ms for at_ms in self.coming if at_ms <= self.world.now_ms]:
            self.coming.remove(at_ms)
            self._started += 1
            worker, table = f"worker/{self._started:04}", _MortalTable(self.name)
            try:
                RouteFeed(table, self.file).load()
            except _DiedError:
                self._bury()
                continue
            self.workers[worker] = table
            self.keeper.handle_worker(worker)
        await self.keeper.step()

    def write(self, *statements: str) -> None:
        _, commit = self.store.execute([(sql, ()) for sql in statements], self.world.now_ms)
        self.take(commit)

    def take(self, commit: Commit | None) -> None:
        """What an agent does with a commit."""
        if commit is None:
            return
        self.world.spread(self, commit)
        for worker, table in list(self.workers.items()):
            self._apply(worker, table, commit.changes)
        self.keeper.handle_commit(commit)

    def _apply(self, worker: str, table: RoutingTable, changes: Sequence[RowChange]) -> bool:
        try:
            for change in changes:
                table.apply(change.table, change.pk, change.row)
        except _DiedError:
            del self.workers[worker]
            self._bury()
            self.keeper.handle_gone(worker, is_death=True)
            return False
        return True

    def _bury(self) -> None:
        self.deaths += 1
        self.coming.append(self.world.now_ms + RESTART_MS)

    def limit(self, table: RoutingTable) -> int | None:
        service = table.find(b"web.test", b"/", 80)
        return None if service is None else service.soft_limit

    # What the keeper needs of a feed and of an agent

    def send(self, message: list[Any], worker: str | None = None) -> None:
        self.sent.append((worker, message))
        table = self.workers.get(worker or "")
        if table is None:
            return
        if message[0] == "try":
            if self._apply(worker, table, [RowChange(*row) for row in message[2]]) and message[1]:
                self.keeper.handle_tried(worker, message[1], "")
        elif message[0] == "reload":
            RouteFeed(table, self.file).load()

    async def read_staged(self) -> Staged:
        return self.store.read_staged()

    def _fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)

    async def release_staged(self, clocks: Collection[Clock]) -> None:
        self._fail()
        self.take(self.store.release_staged(clocks))

    async def put_strikes(self, strikes: Mapping[Clock, int]) -> None:
        self._fail()
        self.store.put_strikes(strikes)

    async def execute(self, statements: Sequence[Statement]) -> None:
        self._fail()
        _, commit = self.store.execute(statements, self.world.now_ms)
        self.take(commit)

    async def query(self, sql: str) -> Answer:
        return Answer([], self.store.connection.execute(sql).fetchall())
