"""Connections to machines of other nodes, from here or through a node.

Decides which of the two it is where that depends on what has failed, which node it is, and which connection a
request gets. Refuses to know HTTP, and who may be reached how in principle (routing/peering.py). Invariant: a
connection is in `_idle` only while no session is on it, and only under the name that it proved or was told.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, Protocol

from routing.peering import Way

from .core.detours import MACHINE_WAIT_S, MACHINE_WAIT_S_MAX, NODE_WAIT_S, NODE_WAIT_S_MAX, Detours
from .core.peer_frames import Order
from .peer_metrics import CONNECT, PeerMetrics
from .peer_tunnel import PeerTunnel
from .peer_upstream import PeerUpstream
from .reach import ForbiddenError, resolve

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

    from routing.peering import Relay, Ways
    from routing.table import Service
    from routing.target import Target

    from .core.plane import Machine, Reaching, Seeker
    from .pool import MachineAddress, Pool
    from .upstream import Upstream

# A name that stands in every handshake; which node it is, the node says itself.
SERVER_NAME: Final = "peer.isthmus"
# A handshake between regions is expensive, and what keeps a connection costs 50 KB at both ends.
IDLE_TIMEOUT_S: Final = 60.0
# On top of what the other node may take to reach the machine: its answer's way, and a lost packet.
ANSWER_SLACK_S: Final = 1.0


class Identity(Protocol):
    """What this node proves itself with to others, and they to it."""

    def contexts(self) -> tuple[ssl.SSLContext, ssl.SSLContext] | None:
        """Return what to speak as the one connected to and as the one who connects; None: in the clear."""

    def label(self, transport: asyncio.BaseTransport) -> str:
        """Return what the other side has proved itself with."""

    def accepts(self, label: str) -> bool:
        """True while that is still good."""


class PeerPool:
    """All connections of one worker to other nodes. The pool asks it for machines of others."""

    def __init__(self, pool: Pool, ways: Ways, identity: Identity, metrics: PeerMetrics) -> None:
        self.ways = ways
        self.metrics = metrics
        self.closed = False  # set by the pool when it closes all connections
        self._pool = pool
        self._identity = identity
        self._idle: dict[str, list[PeerUpstream]] = {}  # by node; the last one put back is last
        self._machines = Detours(MACHINE_WAIT_S, MACHINE_WAIT_S_MAX)  # that cannot be connected to from here
        self._nodes = Detours(NODE_WAIT_S, NODE_WAIT_S_MAX)  # that did not answer

    def acquire(
        self,
        target: Target,
        port: int,
        service: Service,
        seeker: Seeker,
        *,
        fresh: bool,
        eager: bool = False,
        passed: int = 0,
    ) -> Upstream | None:
        """Return a connection that is as good as one to the machine, or None and later tell the seeker.

        `passed` says how many nodes have passed the request on. An `eager` request follows at once, and its
        exchange is told by `handle_unreached` when the machine was not reached.
        """
        order = Order(target.id, target.app, service.port, port, passed + 1, 0, fresh)
        through = _Through(self, target, order, seeker)
        address, way = self._choose(target, port, service, passed)
        if way is Way.NODE:
            return through.start(eager=eager)
        upstream = None if fresh else self._pool.take(address)
        if upstream is None:
            self._pool.begin(address, through.after_direct() if way is Way.AUTO else seeker)
        return upstream

    def connect(self, target: Target, port: int, session: Reaching, make: Callable[[], Any]) -> None:
        """Make a connection for this session alone, and later tell it; `make` makes its protocol."""
        order = Order(target.id, target.app, session.service.port, port, 1, 0, fresh=True)
        through = _Through(self, target, order, _Raw(session, make))
        address, way = self._choose(target, port, session.service)
        if way is Way.NODE:
            through.start(eager=False)
        else:
            self._pool.begin(address, through.after_direct() if way is Way.AUTO else session, make)

    def _choose(
        self, target: Target, port: int, service: Service, passed: int = 0
    ) -> tuple[MachineAddress, Way]:
        """Return where a machine is, and how it is reached now; AUTO: from here, as far as is known."""
        options = service.options
        address = (target.host, port, None if options is None else options.machine_tls)
        way = self.ways.find(target, None if options is None else options.reach, passed)
        name = _name(target)
        if way is Way.AUTO and self._machines.knows(name):
            way = Way.NODE
            if self._machines.is_due(name, self._now()):
                self._probe(name, address)
        return address, way

    def take(self, relays: Sequence[Relay]) -> PeerUpstream | None:
        """Return an idle connection to one of the nodes, the first of them if it can be."""
        for relay in relays:
            idle = self._idle.get(relay.node, [])
            while idle:
                upstream = idle.pop()
                if upstream.transport is not None and not upstream.transport.is_closing():
                    return upstream
        return None

    def put(self, upstream: PeerUpstream) -> None:
        """Take back a connection without a session."""
        idle = self._idle.setdefault(upstream.relay.node, [])
        if self.closed or len(idle) >= self._pool.settings.pool_idle_max:
            upstream.close()
        else:
            upstream.deadline = self._now() + IDLE_TIMEOUT_S
            idle.append(upstream)

    def forget(self, upstream: PeerUpstream) -> None:
        """Give a connection to nobody any more."""
        idle = self._idle.get(upstream.relay.node)
        if idle is not None and upstream in idle:
            idle.remove(upstream)

    def handle_silent(self, upstream: PeerUpstream) -> None:
        """A node did not answer on a connection: neither will it on the others."""
        self._nodes.fail(upstream.relay.node, self._now())
        for idle in self._idle.pop(upstream.relay.node, []):
            idle.close()

    def recheck(self) -> None:
        """Cut connections whose other side is not accepted any more; who uses one is told."""
        for upstream in list(self._pool.connections):
            if isinstance(upstream, PeerUpstream) and not self._identity.accepts(upstream.label):
                upstream.cut()

    def close_idle(self) -> None:
        """Close all connections that nobody uses."""
        for idle in list(self._idle.values()):
            for upstream in list(idle):
                upstream.close()

    def _now(self) -> float:
        return self._pool.loop.time()

    # Machines that may be connected to from here

    def handle_direct_failed(self, name: str) -> None:
        """A machine that could be connected to from here cannot."""
        self._machines.fail(name, self._now())

    def _probe(self, name: str, address: MachineAddress) -> None:
        """Find out whether a machine can be connected to by now; no request waits for that."""
        timeout_s = self._pool.settings.connect_timeout_s
        self._machines.hold(name, self._now(), timeout_s + ANSWER_SLACK_S)
        self._pool.begin(address, _Probe(self, name, timeout_s))

    def handle_probed(self, name: str, *, reached: bool) -> None:
        """A probe has found out."""
        if reached:
            self._machines.succeed(name)
        else:
            self._machines.fail(name, self._now())

    # Connections to nodes

    def find_relays(self, target: Target, passed: int) -> Sequence[Relay]:
        """Return the nodes to go through, those that did not answer last."""
        relays = self.ways.relays(target, passed)
        if len(relays) > 1:
            return sorted(relays, key=lambda relay: self._nodes.knows(relay.node))
        return relays

    def compute_deadline(self, timeout_s: float) -> float:
        """Return until when a node has to answer that may take so long to reach a machine."""
        return self._now() + timeout_s + ANSWER_SLACK_S

    def begin_connecting(self, relays: Sequence[Relay], through: _Through) -> None:
        """Connect to the first of the nodes that answers, and begin a session there."""
        self._pool.run(self._begin(relays, through))

    async def _begin(self, relays: Sequence[Relay], through: _Through) -> None:
        seeker = through.seeker
        error: OSError | ForbiddenError = OSError(0, "no node passes requests on to it")
        where = through.where
        deadline = self._now() + seeker.reach_timeout_s()
        for relay in relays:
            if not self._nodes.is_due(relay.node, self._now()):
                where, error = f"node {relay.node}", OSError(0, "it did not answer a moment ago")
                continue
            try:
                async with asyncio.timeout_at(deadline):
                    upstream = await self._connect(relay)
            except (OSError, ForbiddenError) as failure:
                where, error = f"node {relay.node}", failure
                self.metrics.node(relay.node).fail(CONNECT)
                # A refusal costs nothing; whoever is silent must not take everybody's time.
                if isinstance(failure, TimeoutError):
                    self._nodes.fail(relay.node, self._now())
                continue
            self._nodes.succeed(relay.node)
            through.open(upstream, eager=False)
            return
        self._pool.tell_failure(seeker, where, error)

    async def _connect(self, relay: Relay) -> PeerUpstream:
        # The first time certificates are made, and modules read for it.
        contexts = await asyncio.to_thread(self._identity.contexts)
        secure: dict[str, Any] = {}
        if contexts is not None:
            secure = {"ssl": contexts[1], "server_hostname": SERVER_NAME}
        error: OSError | ForbiddenError = OSError(0, "no address")
        for ip in await resolve(relay.host):
            if contexts is None and not ip.is_loopback:
                error = ForbiddenError("without a cluster key requests only go to nodes on loopback")
                continue
            try:
                transport, upstream = await self._pool.loop.create_connection(
                    lambda: PeerUpstream(self._pool, self, relay), str(ip), relay.port, **secure
                )
            except OSError as failure:
                error = failure
                continue
            return await self._greet(transport, upstream)
        raise error

    async def _greet(self, transport: asyncio.Transport, upstream: PeerUpstream) -> PeerUpstream:
        """Wait until the other node has said who it is: only then has it accepted us."""
        try:
            name = await upstream.greeting
        except asyncio.CancelledError:
            transport.abort()
            raise
        if name != upstream.relay.node:
            transport.abort()
            raise ForbiddenError(f"it is node {name}" if name else "it closed the connection")
        upstream.label = self._identity.label(transport)
        return upstream


def _name(target: Target) -> str:
    """Return what a machine is remembered under: with all others at its address, of whatever port."""
    return f"{target.node} {target.host}"


class _Through:
    """A request that goes through a node."""

    def __init__(self, peers: PeerPool, target: Target, order: Order, seeker: Seeker) -> None:
        self.seeker = seeker
        self.where = f"machine {target.id}"
        self._peers = peers
        self._target = target
        self._order = order

    def after_direct(self) -> Seeker:
        """Return a seeker for a connection from here, after which there is still this way."""
        return _DirectFirst(self._peers, _name(self._target), self)

    def is_possible(self) -> bool:
        """True when there are nodes to go through."""
        return bool(self._peers.find_relays(self._target, self._order.passed - 1))

    def start(self, *, eager: bool) -> PeerUpstream | None:
        """Return a connection for a request that is `eager`; else tell the seeker."""
        peers = self._peers
        relays = peers.find_relays(self._target, self._order.passed - 1)
        upstream = peers.take(relays)
        if upstream is None:
            peers.begin_connecting(relays, self)
            return None
        # Whoever failed before is only known to be well again when it is known that it was reached.
        eager = eager and not self._target.failures
        self.open(upstream, eager=eager)
        return upstream if eager else None

    def open(self, upstream: PeerUpstream, *, eager: bool) -> None:
        """Begin the session on a connection."""
        timeout_s = self.seeker.reach_timeout_s()
        order = self._order._replace(timeout_ms=max(1, int(timeout_s * 1_000)))
        upstream.open(order, self.seeker, self._peers.compute_deadline(timeout_s), eager=eager)


class _DirectFirst:
    """A seeker who goes through a node when there is no connection from here."""

    def __init__(self, peers: PeerPool, name: str, through: _Through) -> None:
        self._peers = peers
        self._name = name
        self._through = through
        self._seeker = through.seeker

    def reach_timeout_s(self) -> float:
        """As the one who seeks."""
        return self._seeker.reach_timeout_s()

    def announcement(self) -> bytes:
        """As the one who seeks."""
        return self._seeker.announcement()

    def handle_connected(self, machine: Machine) -> None:
        """There was no need for a node."""
        self._seeker.handle_connected(machine)

    def handle_connect_failed(self, code: str, detail: str) -> None:
        """Go through a node, if there is one, and let others do so."""
        if self._through.is_possible():
            self._peers.handle_direct_failed(self._name)
            self._through.start(eager=False)
        else:
            self._seeker.handle_connect_failed(code, detail)

    def handle_shortage(self, code: str, detail: str) -> None:
        """Another way would need a connection as well."""
        self._seeker.handle_shortage(code, detail)


class _Raw:
    """A seeker whose connection is for bytes of any kind, and has a protocol of its own."""

    def __init__(self, session: Reaching, make: Callable[[], Any]) -> None:
        self._session = session
        self._make = make

    def reach_timeout_s(self) -> float:
        """As the one who seeks."""
        return self._session.reach_timeout_s()

    def announcement(self) -> bytes:
        """As the one who seeks."""
        return self._session.announcement()

    def handle_connected(self, machine: Any) -> None:
        """Give what goes through a node the shape of a connection."""
        if isinstance(machine, PeerUpstream):
            protocol = self._make()
            PeerTunnel(machine, protocol)
            machine = protocol
        self._session.handle_connected(machine)

    def handle_connect_failed(self, code: str, detail: str) -> None:
        """As the one who seeks."""
        self._session.handle_connect_failed(code, detail)

    def handle_shortage(self, code: str, detail: str) -> None:
        """As the one who seeks."""
        self._session.handle_shortage(code, detail)


class _Probe:
    """A seeker without a request."""

    def __init__(self, peers: PeerPool, name: str, timeout_s: float) -> None:
        self._peers = peers
        self._name = name
        self._timeout_s = timeout_s

    def reach_timeout_s(self) -> float:
        """As for a request."""
        return self._timeout_s

    def announcement(self) -> bytes:
        """Nobody is there to be announced."""
        return b""

    def handle_connected(self, machine: Machine) -> None:
        """Requests are sent from here again; the first one has a connection already."""
        machine.release()
        self._peers.handle_probed(self._name, reached=True)

    def handle_connect_failed(self, code: str, detail: str) -> None:  # noqa: ARG002 - either is no way
        """Still no way."""
        self._peers.handle_probed(self._name, reached=False)

    def handle_shortage(self, code: str, detail: str) -> None:
        """It was not found out; the next one is due in a moment."""
