"""What a node's processes, and the nodes, tell each other of loads, of who is there and of round trips.

Decides when that happens; what is worth telling is said by `routing.loads` and `routing.nearness`. Invariant:
nothing of it is needed to serve: without it workers count what they have themselves, and go by distance.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any, Protocol

from replication.errors import BusyError, StoreError
from routing.loads import NodeLoads, compute_rows_max
from routing.nearness import Nearness

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from replication.metrics import Sample
    from replication.report import MemberView
    from routing.table import RoutingTable

log = logging.getLogger(__name__)

# As often as workers tell what they have.
SHARE_INTERVAL_S = 0.1
# At most so often is a row of `loads` written, in shares.
SHARES_A_WRITE = 5
# Members come and go slowly, and round trips change more slowly.
SHARES_A_LOOK = 10
# A full disk does not become empty in a moment.
AFTER_ERROR_S = 2.0
# What membership says of a node that takes part.
PRESENT = frozenset({"alive", "suspect"})

_PUT = (
    "INSERT INTO loads (machine, node, in_flight, updated_ms) VALUES (?, ?, ?, ?)"
    " ON CONFLICT DO UPDATE SET in_flight = excluded.in_flight, updated_ms = excluded.updated_ms"
)


class Cluster(Protocol):
    """What is needed of the replication agent."""

    def members(self) -> Iterable[MemberView]:
        """Return all nodes that it knows of, itself among them."""

    async def execute(self, statements: Sequence[tuple[str, Sequence[Any]]]) -> Any:
        """Run all statements in one transaction."""


class Feed(Protocol):
    """The way to the workers."""

    def send(self, message: list[Any], worker: str | None = None) -> None:
        """Send a message to one worker, or to all."""


class Sharing:
    """One node's share of it. `nearness` has the round trips in use."""

    def __init__(self, cluster: Cluster, table: RoutingTable, node: str, region: str) -> None:
        self._cluster = cluster
        self._table = table
        self._node = node
        self._region = region
        self._loads = NodeLoads()
        self.nearness = Nearness()
        self._present: list[str] = [node]
        self._rows_written = 0
        self._task: asyncio.Task[None] | None = None

    # Workers, as the feed tells of them

    def add_worker(self, worker: str) -> list[list[Any]]:
        """A worker follows; return what it has to know. What the others have comes with the next share."""
        self._loads.add_worker(worker)
        return [["present", self._present], self._round_trips()]

    def drop_worker(self, worker: str) -> None:
        """A worker is gone."""
        self._loads.drop_worker(worker)

    def handle_counts(self, worker: str, counts: Iterable[tuple[str, int]]) -> None:
        """A worker has something else in flight than before."""
        self._loads.handle_counts(worker, counts)

    # Running

    def start(self, feed: Feed) -> None:
        """Begin to tell."""
        self._task = asyncio.create_task(self._run(feed))

    async def stop(self) -> None:
        """Tell nothing more. The others leave out the loads of a node that is gone."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self, feed: Feed) -> None:
        ticks = 0
        forgotten = False  # the rows of an earlier life of this node
        while True:
            try:
                if not forgotten:
                    await self._cluster.execute([("DELETE FROM loads WHERE node = ?", (self._node,))])
                    forgotten = True
                if ticks % SHARES_A_LOOK == 0:
                    self._look(feed)
                self._share(feed)
                if ticks % SHARES_A_WRITE == 0 and len(self._present) > 1:
                    await self._write()
            except (BusyError, StoreError) as error:
                log.debug("loads were not written", extra={"error": repr(error)})
                await asyncio.sleep(AFTER_ERROR_S)
            except Exception:
                log.exception("loads are not shared")
            ticks += 1
            await asyncio.sleep(SHARE_INTERVAL_S)

    def _look(self, feed: Feed) -> None:
        """See who is there and how far away."""
        members = [member for member in self._cluster.members() if member.state in PRESENT]
        present = sorted(member.name for member in members)
        if present != self._present:
            self._present = present
            self._table.set_present(present)
            feed.send(["present", present])
        regions = self._table.node_regions()
        measured = (
            (regions[member.name], member.rtt_ms)
            for member in members
            if member.rtt_ms is not None and member.name in regions and not member.is_self
        )
        elsewhere = ((region, rtt_ms) for region, rtt_ms in measured if region != self._region)
        if self.nearness.observe(time.monotonic(), elsewhere):
            self._table.set_round_trips(self._region, self.nearness.round_trips_ms.items())
            feed.send(self._round_trips())

    def _round_trips(self) -> list[Any]:
        return ["round_trips", self._region, list(self.nearness.round_trips_ms.items())]

    def _share(self, feed: Feed) -> None:
        self._loads.smooth(self._table.soft_limit)
        shares, totals = self._loads.plan_shares()
        self._table.set_siblings(totals)  # to this process all workers are others
        self._table.follow_loads()
        for worker, counts in shares.items():
            feed.send(["siblings", counts], worker)

    async def _write(self) -> None:
        now_ms = time.time_ns() // 1_000_000
        rows_max = compute_rows_max(len(self._present), SHARES_A_WRITE * SHARE_INTERVAL_S)
        writes, idle = self._loads.plan_writes(now_ms, self._table.soft_limit, rows_max)
        statements: list[tuple[str, tuple[Any, ...]]] = [
            (_PUT, (machine, self._node, in_flight, now_ms)) for machine, in_flight in writes
        ]
        statements += [
            ("DELETE FROM loads WHERE machine = ? AND node = ?", (machine, self._node)) for machine in idle
        ]
        if statements:
            await self._cluster.execute(statements)
            self._loads.confirm(now_ms, writes, idle)
            self._rows_written += len(statements)

    def samples(self) -> Iterator[Sample]:
        """Yield what it does, for the metrics."""
        yield "isthmus_loads_rows_written_total", (), float(self._rows_written)
