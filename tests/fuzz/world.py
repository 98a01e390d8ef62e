"""A client, the proxy and its machines without sockets: bytes in, bytes out, and nothing left behind.

The real connections (`Downstream`, `Upstream`) on fake transports, which write down what is sent and do
what is due in the next turn of the loop when `World.settle` is called. Time stands still until a test
moves it. Machines read with h11, so what the proxy makes of a request is judged by another parser.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import random
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, cast

import h11

from proxy.admission import Admission
from proxy.core.forwarding import Forwarding
from proxy.core.plane import Plane
from proxy.core.queue import Queue
from proxy.core.request_id import RequestIds
from proxy.downstream import Downstream
from proxy.metrics import ProxyMetrics
from proxy.settings import ProxySettings
from proxy.splicing import Pipes
from proxy.upstream import Upstream
from routing.balancer import Balancer
from routing.table import RoutingTable

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.core.exchange import Exchange
    from routing.target import Target

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
SETTINGS = ProxySettings("n1", "ams", head_bytes_max=4_096, url_bytes_max=1_024, replay_body_bytes_max=2_048)
# No input of a few KB takes more turns of the loop; one that does is a hang.
TURNS_MAX = 20_000
# Behind every deadline that there is.
AGES_S = 100_000.0
# Taken and put back: the sockets here have no files to move bytes between.
PIPES = Pipes()
# Different in every run of the same bytes.
_VARIABLE = frozenset((b"fly-request-id", b"x-request-start"))


class Received(NamedTuple):
    """A request as a machine's parser understood it."""

    method: bytes
    target: bytes
    fields: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Socket:
    """Has options that change nothing, and no file, so that all goes through the transport."""

    def setsockopt(self, *_: object) -> None:
        pass

    def fileno(self) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


class Transport(asyncio.Transport):
    """Takes everything at once; the protocol is told of the end in a later turn."""

    def __init__(self, world: World, protocol: Downstream | Upstream) -> None:
        super().__init__()
        self.world = world
        self.protocol = protocol
        self.written = bytearray()
        self.closing = False
        self.aborted = False  # closed with a reset, which the other end can tell from an end
        self.paused = False
        self.waiting: deque[bytes] = deque()  # what comes while reading is paused
        self.open = True

    def write(self, data: bytes) -> None:
        if not self.closing:
            self.written += data

    def writelines(self, pieces: object) -> None:
        for piece in cast("tuple[bytes, ...]", pieces):
            self.write(piece)

    def write_eof(self) -> None:
        pass

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            self.world.later.append(self.end)

    def abort(self) -> None:
        self.aborted = self.aborted or not self.closing
        self.close()

    def end(self, *, eof: bool = False) -> None:
        if self.open:
            self.open = False
            self.closing = True
            self.protocol.connection_lost(None if eof else ConnectionResetError())

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False
        self.world.later.append(self.deliver)

    def receive(self, data: bytes) -> None:
        self.waiting.append(data)
        self.deliver()

    def deliver(self) -> None:
        while self.waiting and not self.paused and not self.closing:
            self.protocol.data_received(self.waiting.popleft())

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_extra_info(self, name: str, default: object = None) -> object:
        return Socket() if name == "socket" else default


class Machine:
    """The other end of one upstream connection."""

    def __init__(self, world: World, transport: Transport) -> None:
        self.world = world
        self.transport = transport
        self.read = 0
        self.parser = h11.Connection(h11.SERVER, max_incomplete_event_size=100_000)
        self.request: h11.Request | None = None
        self.body = b""
        self.answers = 0

    def take(self) -> None:
        """Read what the proxy wrote since, and answer complete requests."""
        written = self.transport.written
        if len(written) == self.read or self.world.tunnelled:
            return
        self.parser.receive_data(bytes(written[self.read :]))
        self.read = len(written)
        while True:
            event = self.parser.next_event()
            if isinstance(event, h11.Request):
                self.request, self.body = event, b""
            elif isinstance(event, h11.Data):
                self.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self.complete(event)
                if self.parser.our_state is not h11.IDLE:
                    return
            else:
                assert event is h11.NEED_DATA or event is h11.PAUSED, event
                return

    def complete(self, end: h11.EndOfMessage) -> None:
        request = self.request
        assert request is not None
        assert not end.headers, "a trailer was forwarded"
        fields = tuple((n, v) for n, v in request.headers if n not in _VARIABLE)
        self.world.received.append(Received(request.method, request.target, fields, self.body))
        self.parser.send(h11.Response(status_code=200, headers=[(b"content-length", b"0")]))
        self.parser.send(h11.EndOfMessage())
        if self.parser.our_state is h11.DONE and self.parser.their_state is h11.DONE:
            self.parser.start_next_cycle()
        self.world.later.append(self.answer)

    def answer(self) -> None:
        self.answers += 1
        for piece in self.world.answer():
            if self.transport.open:
                self.transport.receive(piece)
                self.world.settle()
        if self.world.hangs_up and self.transport.open:
            self.transport.end(eof=True)


class World:
    """One client connection, and as many machine connections as it takes; the connector of the plane."""

    def __init__(
        self, answer: Callable[[], list[bytes]] = lambda: [OK], *, hangs_up: bool = False, table: str = ""
    ) -> None:
        self.answer = answer
        self.hangs_up = hangs_up
        self.now = 100.0
        self.turns = 0
        self.later: deque[Callable[[], None]] = deque()
        self.machines: list[Machine] = []
        self.received: list[Received] = []
        self.settings = SETTINGS
        self.loop = self
        self.pipes = PIPES
        self.connections: set[Upstream] = set()
        self.idle: list[Upstream] = []
        self.metrics = ProxyMetrics()
        self.table = make_table(table)
        for target in self.table.targets():
            target.failures, target.ejected_until = 0, 0.0
        queue = Queue(16, self.metrics)
        self.plane = Plane(
            settings=SETTINGS,
            table=self.table,
            balancer=Balancer(self.table, "ams", random.Random(1)),
            metrics=self.metrics,
            connector=self,
            queue=queue,
            request_ids=RequestIds(lambda bits: 0, "ams"),
            now=self.time,
            wall_us=lambda: 5_000,
            admission=Admission(SETTINGS, self.metrics, 1_000),
            body_kept_max=SETTINGS.replay_body_bytes_max,
        )
        self.clients: set[Downstream] = set()
        self.client = Downstream(self.plane, Forwarding((), "ams", 80), 80, self.clients)
        self.wire = Transport(self, self.client)
        self.client.connection_made(self.wire)

    @property
    def tunnelled(self) -> bool:
        return self.metrics.tunnels > 0

    # What `Pool` is to its connections

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[..., None], *args: object) -> None:
        self.later.append(lambda: callback(*args))

    def acquire(self, target: Target, port: int, exchange: Exchange, *, fresh: bool) -> Upstream | None:
        while self.idle and not fresh:
            upstream = self.idle.pop()
            if upstream.transport is not None and not upstream.transport.is_closing():
                return upstream
        self.later.append(lambda: self.connect(exchange))
        return None

    def connect(self, exchange: Exchange) -> None:
        upstream = Upstream(cast("object", self), ("10.0.0.1", 80, None))  # type: ignore[arg-type]
        transport = Transport(self, upstream)
        upstream.connection_made(transport)
        self.machines.append(Machine(self, transport))
        exchange.handle_connected(upstream)

    def put(self, upstream: Upstream) -> None:
        upstream.deadline = self.now + 1
        self.idle.append(upstream)

    def add(self, upstream: Upstream) -> None:
        self.connections.add(upstream)
        self.metrics.upstreams_open += 1

    def remove(self, upstream: Upstream) -> None:
        self.connections.discard(upstream)
        self.metrics.upstreams_open -= 1
        if upstream in self.idle:
            self.idle.remove(upstream)

    # What drives it

    def send(self, *pieces: bytes) -> None:
        """Let the client send these, each in a read of its own."""
        for piece in pieces:
            if self.wire.open and piece:
                self.wire.receive(piece)
                self.settle()

    def settle(self) -> None:
        """Do all that is due at this moment."""
        busy = True
        while busy:
            busy = False
            while self.later:
                self.turns += 1
                assert self.turns < TURNS_MAX, "it does not come to rest"
                self.later.popleft()()
                busy = True
            for machine in list(self.machines):
                before = machine.read
                machine.take()
                busy = busy or machine.read != before or bool(self.later)

    def age(self) -> None:
        """Let every deadline pass that there is at this moment."""
        self.now += AGES_S
        for connection in (*self.clients, *self.connections):
            if connection.deadline <= self.now:
                connection.handle_deadline()
        self.settle()

    def end(self) -> None:
        """Let the client leave and time pass; nothing may be left of either."""
        self.settle()
        self.wire.end(eof=True)
        self.settle()
        for _ in range(4):
            self.age()
        metrics = self.metrics
        assert not self.clients
        assert (metrics.in_flight, metrics.queued, metrics.connections_open) == (0, 0, 0)
        assert metrics.upstreams_open == len(self.connections) == 0, "a machine's connection is left"
        assert all(target.in_flight == 0 for target in self.table.targets())


@functools.cache  # making it takes longer than most inputs
def make_table(name: str) -> RoutingTable:
    """Return a routing table for one world at a time."""
    table = RoutingTable("n1")
    for app in ("app", "other"):
        table.apply("apps", (app,), (app, "default", ""))
        table.apply("services", (app, 0), (app, 0, 8080, "requests", 10, None, "[]", "", "{}"))
        table.apply("hostnames", (f"{app}.test", "/"), (f"{app}.test", "/", app, ""))
        table.apply("machines", (app,), (app, app, "n1", "ams", "10.0.0.1:80", "started", 0, ""))
    table.apply("hostnames", ("*", "/"), ("*", "/", "app", ""))
    assert not table.rejected
    return table
