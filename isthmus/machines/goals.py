"""Goals of machines, as the table has them and as this node sets them.

Decides nothing but that a goal is written once at a time. Refuses to know what becomes of it. Invariant: what
could not be written is logged, and left to whoever wants it to ask again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import TYPE_CHECKING, Final

from isthmus.registry import put_goal
from routing.types import GoalRow, MachineState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from isthmus.registry import Database
    from replication.metrics import Sample
    from routing.table import RoutingTable

log = logging.getLogger(__name__)

METRICS: Final[Mapping[str, tuple[str, str]]] = {
    "isthmus_machine_goals_total": ("counter", "Goals that this node has set by itself, by reason"),
}


class Goals:
    """Reads goals from the table, and writes them for one node."""

    def __init__(self, table: RoutingTable, database: Database, node: str) -> None:
        self._table = table
        self._database = database
        self._node = node
        self._writing: dict[str, asyncio.Task[None]] = {}  # by machine
        self._written: Counter[str] = Counter()

    def find(self, machine: str) -> GoalRow | None:
        """Return what the machine is to be, if anybody has said so."""
        goal = self._table.rows("goals").get((machine,))
        return goal if isinstance(goal, GoalRow) else None

    def put(self, machine: str, state: MachineState, reason: str) -> None:
        """Set a goal, unless one is just being set."""
        if machine not in self._writing:
            work = self._write(machine, state, reason)
            self._writing[machine] = asyncio.get_running_loop().create_task(work)

    async def stop(self) -> None:
        """Wait until what is being written is."""
        await asyncio.gather(*self._writing.values())

    async def _write(self, machine: str, state: MachineState, reason: str) -> None:
        shown = {"machine": machine, "state": state.value, "reason": reason}
        try:
            await self._database.execute([put_goal(machine, state.value, self._node, reason)])
            self._written[reason] += 1
            log.info("a machine has a new goal", extra=shown)
        except Exception:
            log.exception("a goal could not be written", extra=shown)
        finally:
            del self._writing[machine]

    def samples(self) -> Iterator[Sample]:
        """Yield how many were set, and why."""
        for reason, count in self._written.items():
            yield "isthmus_machine_goals_total", (("reason", reason),), float(count)
