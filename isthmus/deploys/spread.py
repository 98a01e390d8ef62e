"""How many machines an app has, and where: what has to be started, made and stopped for that.

Decides the numbers, and which machines come and go. Refuses to know what is behind a driver. Invariant:
nothing is destroyed: machines that are too many are stopped and kept out, and may come back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from isthmus.config_machines import PROCESS, MachineConfig
from isthmus.deploys.releases import cordon, find_current, read_releases, retire, run
from isthmus.machines.driver import DriverError, Machine
from isthmus.registry import RegistryError
from routing.types import MachineState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from isthmus.machines.driver import Driver
    from isthmus.registry import Database, Registry, Statement
    from routing.table import RoutingTable
    from routing.target import Target


def plan_counts(count: int, regions: Sequence[str]) -> dict[str, int]:
    """Return how many of `count` machines each region has: as evenly as can be, the first named the rest."""
    named = list(dict.fromkeys(regions))
    return {region: count // len(named) + (i < count % len(named)) for i, region in enumerate(named)}


class Spreader:
    """Brings the machines of an app to a number. New ones are owned by the node that is asked."""

    def __init__(
        self,
        table: RoutingTable,
        database: Database,
        registry: Registry,
        drivers: Mapping[str, Driver],
        *,
        node: str,
        clock_ms: Callable[[], int],
    ) -> None:
        self._table = table
        self._database = database
        self._registry = registry
        self._drivers = drivers
        self._node = node
        self._clock_ms = clock_ms

    async def scale(self, app: str, count: int, regions: Sequence[str], *, dry_run: bool) -> dict[str, Any]:
        """Start, make and stop machines; returns what was done, and what only a person can do."""
        found = self._table.app(app)
        if found is None or found.row is None:
            raise RegistryError(f"there is no app `{app}`", found=False)
        machines = sorted(found.targets(), key=lambda target: target.id)
        serving = [t for t in machines if _counts(t)]
        await self._refuse(app, regions)
        regions = regions or sorted({target.region for target in serving or machines})
        if not regions:
            raise RegistryError(f"app `{app}` has no machine, so its regions have to be said: --region")
        changes: list[dict[str, Any]] = []
        advice: list[str] = []
        for region, want in plan_counts(count, regions).items():
            here = [target for target in serving if target.region == region]
            for target in sorted(here, key=lambda target: not target.healthy)[want:]:
                changes.append(_describe(region, target.id, "stop"))
                if not dry_run:
                    await self._database.execute(self._stop(target))
            spares = [t for t in machines if t.region == region and t.cordoned and t.driver]
            for target in spares[: max(0, want - len(here))]:
                changes.append(_describe(region, target.id, "start"))
                if not dry_run:
                    await self._database.execute(await self._start(app, target.id))
            missing = want - len(here) - len(spares)
            for _ in range(missing):
                problem = await self._create(app, region, machines, changes, dry_run=dry_run)
                if problem:
                    advice.append(f"{region} has {want - missing} of {want} machines: {problem}")
                    break
        return {"app": app, "regions": plan_counts(count, regions), "changes": changes, "advice": advice}

    async def _refuse(self, app: str, regions: Sequence[str]) -> None:
        """Refuse a region that nobody knows, and all while a deploy of the app runs."""
        for region in regions:
            await self._registry.refuse_unknown_region(region)
        for release in await read_releases(self._database, app):
            if release.is_running:
                raise RegistryError(f"release {release.version} of `{app}` is {release.status.value}")

    def _stop(self, target: Target) -> list[Statement]:
        now_ms = self._clock_ms()
        return [
            *cordon([target.id], cordoned=True),
            *retire([target.id], self._node, now_ms, "scale"),
        ]

    async def _start(self, app: str, machine: str) -> list[Statement]:
        """A machine that comes back takes up the release of the others."""
        current = find_current(await read_releases(self._database, app))
        version, name = (current.version, current.release) if current is not None else (0, "")
        started = run(machine, version, name, self._node, self._clock_ms(), "scale")
        return [*cordon([machine], cordoned=False), *started]

    async def _create(
        self,
        app: str,
        region: str,
        machines: Sequence[Target],
        changes: list[dict[str, Any]],
        *,
        dry_run: bool,
    ) -> str:
        """Have a driver make one more machine; returns what is wrong with that."""
        like = next((target for target in machines if target.driver in self._drivers), None)
        if like is None:
            return (
                f"no machine of it has a driver of node {self._node}; start one yourself, and add it on a "
                f"node there: isthmus machine add {app} HOST:PORT --region {region}"
            )
        port = like.port
        template = Machine(like.id, app, like.region, like.host, port)
        if dry_run and like.driver != PROCESS:  # which only says that it makes none
            changes.append(_describe(region, "", f"create with {like.driver}"))
            return ""
        try:
            made = await self._drivers[like.driver].create(template, region)
        except DriverError as error:
            return str(error)
        known = self._table.machine(made.id) is not None
        if known or made.id in {change["machine"] for change in changes}:
            return f"{like.driver} says that it has made {made.id}, which is there already"
        try:
            config = MachineConfig(address=made.address, id=made.id, region=region, driver=like.driver)
            _, added = await self._registry.plan_machines(app, [config], "")
        except (RegistryError, ValueError) as error:
            return f"{like.driver} has made {made.id}, which cannot be added: {error}"
        await self._database.execute([*added, *await self._start(app, made.id)])
        changes.append(_describe(region, made.id, "create"))
        return ""


def _counts(target: Target) -> bool:
    """True for a machine that serves, or would if it were needed."""
    return not target.cordoned and (bool(target.driver) or target.state is MachineState.STARTED)


def _describe(region: str, machine: str, done: str) -> dict[str, Any]:
    return {"region": region, "machine": machine, "done": done}
