"""All that looks after the machines of a node: drivers, goals, the keeper and the scaler.

Builds them, and owns their order of start and stop. Invariant: processes of this node end with it, unless a
successor goes on with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.config_machines import PROCESS, MachineConfig
from isthmus.machines import goals, keeper
from isthmus.machines.driver import Driver, Machine
from isthmus.machines.fly import FlyDriver
from isthmus.machines.goals import Goals
from isthmus.machines.keeper import Keeper
from isthmus.machines.process import ProcessDriver
from isthmus.machines.scaler import Scaler
from isthmus.machines.webhook import WebhookDriver

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from isthmus.checking.probe import Prober
    from isthmus.config import Config
    from isthmus.registry import Database, Registry
    from replication.core.change import Commit
    from replication.metrics import Sample
    from routing.table import RoutingTable

METRICS: Mapping[str, tuple[str, str]] = {**keeper.METRICS, **goals.METRICS}


def make_drivers(config: Config) -> dict[str, Driver]:
    """Return the drivers that a configuration names, without that of processes."""
    return {
        name: WebhookDriver(driver, config.node) if driver.type == "webhook" else FlyDriver(driver)
        for name, driver in config.drivers.items()
    }


class Machines:
    """The machines of one node that have a driver. `present` has the nodes that are there."""

    def __init__(
        self,
        config: Config,
        table: RoutingTable,
        database: Database,
        prober: Prober,
        present: Callable[[], Collection[str]],
        clock_ms: Callable[[], int],
    ) -> None:
        self._present = present
        self._processes = ProcessDriver(Path(config.data) / "machines", {})
        self._goals = Goals(table, database, config.node)
        self._drivers: dict[str, Driver] = {PROCESS: self._processes, **make_drivers(config)}
        self._keeper = Keeper(
            table,
            database,
            prober,
            self._drivers,
            self._goals,
            node=config.node,
            settings=config.machines,
            clock_ms=clock_ms,
        )
        self._scaler = Scaler(
            table,
            self._keeper,
            self._goals,
            present,
            node=config.node,
            idle_s=config.machines.idle_ms / 1000,
            clock_ms=clock_ms,
        )
        self._is_started = False

    async def start(self, config: Config, registry: Registry) -> None:
        """Go on with processes that still run, and begin; what the configuration declares is in the table."""
        self._processes.configs = find_commands(config, registry)
        self._processes.adopt()
        await self._keeper.start()
        for machine in self._processes.machines():
            if not self._keeper.owns(machine):
                await self._processes.stop(Machine(machine, "", "", "", None))
        self._scaler.start()
        self._is_started = True

    async def stop(self, *, leaves: bool) -> None:
        """Look no more; end the processes, unless a successor goes on with them."""
        if not self._is_started:
            return
        self._is_started = False
        await self._scaler.stop()
        await self._goals.stop()
        if leaves:
            await self._keeper.shut_down(alone=len(self._present()) <= 1)
        else:
            await self._keeper.stop()
        self._processes.close()

    def adopt(self, config: Config, registry: Registry) -> None:
        """Go on with other commands; machines whose command has changed are started again with it."""
        before, after = self._processes.configs, find_commands(config, registry)
        self._processes.configs = after
        self._keeper.restart([m for m in after if m in before and _is_other(before[m], after[m])])

    @property
    def drivers(self) -> Mapping[str, Driver]:
        """What starts and stops machines here, by name."""
        return self._drivers

    def handle_commit(self, commit: Commit) -> None:
        """Look again at the machines that a commit is about."""
        self._keeper.handle_commit(commit)

    def start_for_request(self, machine: str) -> None:
        """A worker has requests that wait for this machine."""
        self._scaler.start_for_request(machine)

    def samples(self) -> Iterator[Sample]:
        """Yield the metrics of machines."""
        yield from self._keeper.samples()
        yield from self._goals.samples()


def find_commands(config: Config, registry: Registry) -> dict[str, MachineConfig]:
    """Return the machines that are processes of this node, by id."""
    return {
        machine.id: machine
        for app in config.apps
        for machine in registry.name_machines(app.name, app.machines)
        if machine.command
    }


def _is_other(before: MachineConfig, after: MachineConfig) -> bool:
    """True when what runs is not what should; a policy that counts at its end needs no other process."""
    parts = ("command", "env", "directory", "address")
    return any(getattr(before, part) != getattr(after, part) for part in parts)
