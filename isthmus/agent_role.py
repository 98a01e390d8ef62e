"""The agent process: replication, checks, the feed to the workers, and the admin listener.

Builds the parts, and owns their order of start and stop. Invariant: the feed and the admin API never show a
change that is not committed, because both follow the replication agent's commits.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from typing import TYPE_CHECKING

from isthmus.admin.keys import KeyRoutes
from isthmus.admin.metrics import WorkerTotals
from isthmus.admin.server import AdminServer
from isthmus.admin.views import Views
from isthmus.checks import Checker
from isthmus.config import Config, ConfigError, format_address, parse_listen
from isthmus.credentials import Credentials
from isthmus.declared import load_schema
from isthmus.feed import FeedServer
from isthmus.registry import Registry, RegistryError
from isthmus.role import RefusedError
from isthmus.route_feed import RouteFeed
from replication.agent import Agent
from replication.core.limits import ALL, OriginSettings
from replication.errors import ReplicationError
from replication.settings import AgentSettings
from replication.subscriptions import Subscriptions
from routing.table import RoutingTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from replication.core.change import Commit
    from replication.metrics import Sample

log = logging.getLogger(__name__)

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
    )


class AgentRole:
    """One node's agent. The parts are built in `start`, in the order in which they need each other."""

    def __init__(
        self, config: Config, on_lost: Callable[[], None] = lambda: None, *, is_successor: bool = False
    ) -> None:
        """Build what needs no other part; raises RefusedError.

        on_lost is called when this role has to be stopped and a successor started in its place.
        """
        self._config = config
        self._table = RoutingTable(config.node)
        self._routes = RouteFeed(self._table, config.database)
        self._totals = WorkerTotals()
        try:
            self._credentials = Credentials(config.gossip)
            settings = agent_settings(config, self._credentials)
            schema = load_schema(config.database)
        except (ConfigError, ReplicationError) as error:
            raise RefusedError(f"the agent cannot start: {error}") from error
        self._on_lost = on_lost
        self._is_successor = is_successor
        self._agent = Agent(
            settings, schema, on_commit=self._handle_commit, on_lost=lambda _: self._handle_lost()
        )
        self._checker = Checker(self._agent, config.node)
        self._subscriptions = Subscriptions(config.database, schema)
        self._feed: FeedServer | None = None
        self._admin: AdminServer | None = None

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
        self._feed = FeedServer(config.feed_socket, self._routes.load(), self._totals.handle_samples)
        await self._feed.start()
        own = {config.proxy.listen, config.admin.listen, gossip}
        await self._subscriptions.start()
        registry = Registry(self._agent, config.node, config.region, own)
        views = Views(config, self._agent, self._table, self._feed)
        keys = KeyRoutes(self._credentials, self._agent.replace_keys)
        self._admin = AdminServer(
            config.admin, views, registry, self._samples, self._agent, self._subscriptions, keys
        )
        await self._admin.start()
        own.add(self._admin.address)  # the system may have chosen its port
        await registry.announce(config, config.proxy.listen, time.time_ns() // 1_000_000)
        await self._checker.start()
        return {"admin": self._admin.address, "gossip": gossip}

    async def stop(self) -> None:
        """Stop all parts, the last started first; the replication agent says goodbye to the others."""
        await self._checker.stop()
        await self._subscriptions.stop()  # before the listener, which would wait for the streams
        if self._admin is not None:
            await self._admin.stop()
        await self._agent.stop()
        if self._feed is not None:
            await self._feed.stop()

    def reload(self) -> None:
        """Read keys and certificates again; what is wrong with them is logged and shown."""
        with contextlib.suppress(ConfigError):
            self._credentials.reload(self._agent.replace_keys)

    def _handle_lost(self) -> None:
        if self._feed is not None:
            self._feed.publish_lost()
        self._on_lost()

    def _handle_commit(self, commit: Commit) -> None:
        if not commit.changes and not commit.reload:
            return  # everything in it had been overwritten already
        if commit.reload:
            self._routes.load()
        else:
            for change in commit.changes:
                self._routes.apply(change)
        if self._feed is not None:
            self._feed.publish(commit)
        self._subscriptions.handle_commit(commit)
        self._checker.on_tables_changed({*commit.reload, *(change.table for change in commit.changes)})

    def _samples(self) -> Iterator[Sample]:
        yield from self._totals.samples()
        yield from self._agent.samples()
        yield from self._checker.samples()
        yield from self._subscriptions.samples()
        yield from self._credentials.samples()
        if self._feed is not None:
            yield "isthmus_feed_followers", (), float(len(self._feed.followers))
