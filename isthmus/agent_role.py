"""The agent process: replication, checks, the feed to the workers, and the admin listener.

Builds the parts, and owns their order of start and stop. Invariant: the feed and the admin API never show a
change that is not committed, because both follow the replication agent's commits.
"""

from __future__ import annotations

import logging
import random
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus.admin.deploys import DeployRoutes
from isthmus.admin.explain import ExplainRoutes
from isthmus.admin.facts import FactRoutes
from isthmus.admin.keys import KeyRoutes
from isthmus.admin.lifecycle import LifecycleRoutes
from isthmus.admin.metrics import WorkerTotals
from isthmus.admin.rollouts import RolloutRoutes
from isthmus.admin.server import AdminServer
from isthmus.admin.staging import StagingRoutes
from isthmus.admin.views import PRESENT, Views
from isthmus.checking.checker import Checker
from isthmus.checking.probe import Prober
from isthmus.checking.watchers import Presence
from isthmus.config import Config, ConfigError, format_address, parse_listen
from isthmus.credentials import Credentials
from isthmus.declared import load_schema
from isthmus.deploys.conductor import Conductor
from isthmus.deploys.spread import Spreader
from isthmus.feed import FeedServer
from isthmus.machines.wiring import Machines
from isthmus.registry import Registry, RegistryError
from isthmus.reloading import Lifecycle
from isthmus.role import RefusedError
from isthmus.rollouts.errand import Errands
from isthmus.rollouts.keeper import Keeper as RolloutKeeper
from isthmus.rollouts.watch import Watch
from isthmus.route_feed import RouteFeed
from isthmus.sharing import Sharing
from isthmus.staging.keeper import STAGED, Keeper
from proxy.reach import Reach
from replication.agent import Agent
from replication.core.limits import ALL, OriginSettings
from replication.errors import ReplicationError
from replication.settings import AgentSettings
from replication.subscriptions import Subscriptions
from routing.table import RoutingTable
from routing.types import MachineState, NodeRow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from isthmus.role import Control
    from replication.core.change import Commit
    from replication.metrics import Sample

log = logging.getLogger(__name__)

_NOBODY = "nobody keeps the processes of this node"
# Peers answer within a second; a node without any has nobody to wait for.
CATCH_UP_S = 5.0


def agent_settings(config: Config, credentials: Credentials) -> AgentSettings:
    """Return what the replication agent needs to know of the configuration."""
    gossip, limits = config.gossip, config.replication
    return AgentSettings(
        name=config.node,
        path=config.database,
        synchronous=config.synchronous,
        bind=parse_listen(gossip.listen),
        advertise=parse_listen(gossip.advertise) if gossip.advertise else None,
        join=gossip.join,
        keys=credentials.keys,
        tls=credentials.tls,
        cluster=gossip.cluster,
        writes_per_s={**limits.table_writes_per_s, ALL: limits.writes_per_s},
        origins=OriginSettings(limits.origin_changesets_per_s, limits.origin_bytes_per_s),
        staged=STAGED if config.staging.bake_ms else frozenset(),
    )


class _Alone:
    """Stands in for whoever keeps a node's processes, where there is nobody."""

    lifecycle = Lifecycle()

    async def reload(self) -> Lifecycle:
        return Lifecycle(reload_problem=_NOBODY)

    async def upgrade(self) -> None:
        raise RefusedError(_NOBODY)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class AgentRole:
    """One node's agent. The parts are built in `start`, in the order in which they need each other."""

    def __init__(
        self,
        config: Config,
        on_lost: Callable[[], None] = lambda: None,
        *,
        is_successor: bool = False,
        control: Control | None = None,
        counted: Mapping[str, Iterable[Any]] | None = None,
        on_counted: Callable[[dict[str, list[Any]]], None] = lambda _: None,
    ) -> None:
        """Build what needs no other part; raises RefusedError.

        on_lost is called when this role has to be stopped and a successor started in its place. counted is
        what workers had counted that are gone, and on_counted is called with it when there are more.
        """
        self._config = config
        self._control = control or _Alone()
        self._table = RoutingTable(config.node)
        self._routes = RouteFeed(self._table, config.database)
        self._totals = WorkerTotals(counted, on_counted)
        try:
            Errands(Path(config.data), config.database).carry_out()
            self._credentials = Credentials(config.gossip)
            settings = agent_settings(config, self._credentials)
            schema = load_schema(config.database)
        except (ConfigError, OSError, ReplicationError) as error:
            raise RefusedError(f"the agent cannot start: {error}") from error
        self._on_lost = on_lost
        self._is_lost = False  # set when a successor is to be started in our place
        self._returns = False  # set when that goes on as the same member, with the same database
        self._is_successor = is_successor
        self._agent = Agent(
            settings, schema, on_commit=self._handle_commit, on_lost=lambda _: self._handle_lost()
        )
        self._own: list[tuple[str, int]] = []  # where this node listens; set by `start`
        self._reach = Reach(config.proxy.machine_networks, config.tls.client_certificate)
        prober = Prober(self._reach)
        presence = Presence(config.node, config.region, time.monotonic())
        self._checker = Checker(
            self._table,
            self._agent,
            prober,
            presence,
            self._present_nodes,
            node=config.node,
            rng=random.Random(),
            clock_ms=_now_ms,
        )
        self._machines = Machines(config, self._table, self._agent, prober, lambda: presence.regions, _now_ms)
        self._conductor = Conductor(
            self._table,
            self._agent,
            prober,
            self._is_known,
            lambda: presence.regions,
            node=config.node,
            clock_ms=_now_ms,
        )
        self._sharing = Sharing(self._agent, self._table, config.node, config.region)
        self._subscriptions = Subscriptions(config.database, schema)
        self._staging = Keeper(
            self._agent,
            config.staging,
            lambda: self._table.node_regions().values(),
            node=config.node,
            region=config.region,
        )
        self._rollouts = RolloutKeeper(
            self._agent,
            self._control,
            lambda: self._config,
            present=self._present_nodes,
            watch=lambda: Watch(self._totals.samples, self._count_deaths, self._find_checked),
            restart=self._make_way,
        )
        self._feed: FeedServer | None = None
        self._admin: AdminServer | None = None
        self._registry: Registry | None = None

    async def start(self) -> dict[str, str]:
        """Start all parts; returns the addresses of the admin and gossip listeners."""
        try:
            await self._agent.start()
        except (OSError, sqlite3.Error, ReplicationError) as error:
            raise RefusedError(f"the agent cannot start: {error}") from error
        try:
            return await self._start_parts()
        except BaseException as error:
            await self.stop()  # or the database's threads would keep the process from ending
            if isinstance(error, (OSError, sqlite3.Error, RegistryError, ReplicationError)):
                raise RefusedError(str(error)) from error
            raise

    async def _start_parts(self) -> dict[str, str]:
        """Start what stands on the replication agent."""
        config = self._config
        gossip = format_address(*self._agent.address)
        if self._is_successor:
            # The file may hold little, and workers have a good table until they find the feed.
            await self._agent.catch_up(CATCH_UP_S)
        totals = self._totals
        self._feed = FeedServer(
            config.feed_socket, self._routes.load(), totals.handle_samples, totals.handle_gone, self._sharing
        )
        self._feed.on_start = self._machines.start_for_request
        self._staging.prepare(self._feed, is_empty=not any(app.row for app in self._table.apps()))
        self._feed.trials = self._staging
        await self._feed.start()
        own = {*config.listeners.values(), config.admin.listen, gossip}
        await self._subscriptions.start()
        registry = self._registry = Registry(self._agent, config.node, config.region, own, config.drivers)
        drivers = self._machines.drivers
        spreader = Spreader(self._table, self._agent, registry, drivers, node=config.node, clock_ms=_now_ms)
        rollout = self._rollouts.describe
        views = Views(
            config,
            self._agent,
            self._table,
            self._feed,
            lifecycle=lambda: self._control.lifecycle,
            last_probes=self._checker.last_probes,
            staged=self._staging.count,
            rollout=rollout,
            traffic=totals.traffic,
        )
        self._admin = AdminServer(
            config.admin,
            views,
            registry,
            self._samples,
            self._agent,
            self._subscriptions,
            KeyRoutes(self._credentials),
            LifecycleRoutes(self._control),
            others=[
                StagingRoutes(self._staging, self._agent.members),
                RolloutRoutes(self._rollouts),
                DeployRoutes(self._agent, registry, self._conductor, spreader),
                ExplainRoutes(lambda: self._config, self._table, self._agent, self._feed, self._credentials),
                FactRoutes(
                    lambda: self._config,
                    self._table,
                    self._agent,
                    lambda: self._control.lifecycle,
                    self._credentials,
                    Prober(self._reach),
                    self._staging.describe,
                    rollout,
                ),
            ],
        )
        await self._admin.start()
        own.add(self._admin.address)  # the system may have chosen its port
        await registry.announce(config, config.proxy.listen, _now_ms())
        await self._staging.start()
        self._own = [parse_listen(address) for address in own]
        await self._reach.open(self._own)
        await self._checker.start()
        self._sharing.start(self._feed)
        await self._machines.start(config, registry)
        await self._conductor.start()
        await self._rollouts.start()
        return {"admin": self._admin.address, "gossip": gossip}

    async def stop(self) -> None:
        """Stop all parts, the last started first; the replication agent says goodbye to the others."""
        await self._stop(leaves=True)

    async def retire(self) -> None:
        """Stop all parts for a successor that starts at once."""
        await self._stop(leaves=False)

    async def _stop(self, *, leaves: bool) -> None:
        await self._rollouts.stop()
        await self._staging.stop()
        await self._conductor.stop()
        await self._machines.stop(leaves=leaves and not self._is_lost)
        await self._sharing.stop()
        await self._checker.stop()
        await self._subscriptions.stop()  # before the listener, which would wait for the streams
        if self._admin is not None:
            await self._admin.stop()
        await self._agent.stop(leaves=leaves and not self._returns)
        if self._feed is not None:
            await self._feed.stop()
        self._totals.handle_end()

    async def adopt(self, config: Config) -> None:
        """Go on with another configuration: keys, and what it declares if that has changed.

        Rows that were changed by hand meanwhile stay as they are otherwise.
        """
        before = self._config
        try:
            self._credentials.check(config.gossip)
            if self._registry is not None and (config.apps, config.regions) != (before.apps, before.regions):
                await self._registry.declare(config)
                self._machines.adopt(config, self._registry)
            self._credentials.reload(config.gossip, self._agent.replace_keys)
        except (ConfigError, RegistryError, ReplicationError) as error:
            raise RefusedError(str(error)) from error
        self._config = config
        await self._reach.adopt(config.proxy.machine_networks, config.tls.client_certificate, self._own)

    def refresh(self) -> None:
        """Do nothing: the files of an agent are read when it adopts."""

    def _make_way(self) -> None:
        self._returns = True
        self._handle_lost()

    def _handle_lost(self) -> None:
        self._is_lost = True
        if self._feed is not None:
            self._feed.publish_lost()
        self._on_lost()

    def _handle_commit(self, commit: Commit) -> None:
        if not commit.changes and not commit.reload and not commit.held:
            return  # everything in it had been overwritten already
        if commit.reload:
            self._routes.load()
        else:
            for change in commit.changes:
                self._routes.apply(change)
        if self._feed is not None:
            self._feed.publish(commit)
        self._subscriptions.handle_commit(commit)
        self._checker.handle_commit(commit)
        self._machines.handle_commit(commit)
        self._staging.handle_commit(commit)
        self._rollouts.handle_commit(commit)

    def _present_nodes(self) -> dict[str, str]:
        """Return the region of each node that takes part."""
        present = {member.name for member in self._agent.members() if member.state in PRESENT}
        rows = self._table.rows("nodes").values()
        return {row.id: row.region for row in rows if isinstance(row, NodeRow) and row.id in present}

    def _count_deaths(self) -> int:
        return 0 if self._feed is None else self._feed.deaths

    def _find_checked(self) -> dict[str, bool]:
        """Return whether each machine of this node that has checks, and is to serve, passes them."""
        own = (target for target in self._table.targets() if target.node == self._config.node)
        return {
            t.id: t.healthy for t in own if t.checks and t.state is MachineState.STARTED and not t.cordoned
        }

    def _is_known(self, since_ms: int) -> bool:
        """True when all nodes that take part have what was written by then."""
        if len(self._present_nodes()) <= 1:
            return True
        ago = self._agent.stable_ms_ago()
        return ago is not None and _now_ms() - ago > since_ms

    def _samples(self) -> Iterator[Sample]:
        yield from self._totals.samples()
        yield "isthmus_config_reload_failed", (), float(bool(self._control.lifecycle.reload_problem))
        yield from self._agent.samples()
        yield from self._checker.samples()
        yield from self._machines.samples()
        yield from self._conductor.samples()
        yield from self._sharing.samples()
        yield from self._staging.samples()
        yield from self._rollouts.samples()
        yield from self._subscriptions.samples()
        yield from self._credentials.samples()
        if self._feed is not None:
            yield "isthmus_feed_followers", (), float(len(self._feed.followers))
