"""A connection of another node, for whose requests this one stands in front of its machines.

Decides whether a session may begin, and passes its bytes. Refuses to know what they mean, and who the other
node is: whoever got this far has proved that it belongs to us (see peer_listener). Invariant: a connection is
only ever made to a machine of the table, by the rules that hold for this node's own requests; and a machine's
connection is kept only when all that came from it was taken and all that was sent is gone.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, cast

from routing.peering import Way

from .core.errors import CONNECT_FAILED, OVERLOADED
from .core.peer_frames import (
    CLEAN,
    DATA,
    ENDED,
    FRESH,
    GOODBYE,
    KEPT,
    LOST,
    OPEN,
    OPENED,
    RELEASE,
    FrameError,
    FrameReader,
    Order,
    encode_data,
    encode_frame,
    encode_hello,
    encode_refusal,
    parse_open,
    parse_release,
)
from .sweeper import NEVER
from .transports import go_on_reading, hold_reading

if TYPE_CHECKING:
    from routing.target import Target

    from .core.plane import Machine, Plane
    from .peer_pool import PeerPool
    from .upstream import Upstream

# Longer than the other node keeps it, so that it is the one who ends it.
IDLE_TIMEOUT_S: Final = 120.0
# Nodes that pass on one request: the one in the machine's region, then its owner.
PASSED_MAX: Final = 2


class PeerSession(asyncio.Protocol):
    """An accepted connection, with one session after the other; `open_ones` is where the server finds it."""

    def __init__(self, plane: Plane, peers: PeerPool, open_ones: set[PeerSession]) -> None:
        self.deadline = NEVER
        self.label = ""  # of what the other node has proved itself with
        self._plane = plane
        self._peers = peers
        self._metrics = peers.metrics
        self._open_ones = open_ones
        self._transport: asyncio.Transport | None = None  # from connection_made to connection_lost
        self._frames = FrameReader()
        self._order: Order | None = None  # of the session, from OPEN to its end
        self._target: Target | None = None  # as `_order`; counts it
        self._machine: Upstream | None = None  # from when it is reached
        self._waiting: list[bytes] = []  # for a machine that is not reached yet
        self._waiting_bytes = 0
        self._sent = 0  # bytes of the machine, in this session
        self._paused = False  # not reading
        self._blocked = False  # from pause_writing to resume_writing
        self._leaving = False  # the other node was told to open no session any more

    @property
    def is_idle(self) -> bool:
        """True when there is no session."""
        return self._order is None

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say who we are: the other node waits for it."""
        if self._plane.admission.admit("") is not None:
            cast("asyncio.Transport", transport).abort()
            return
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(self._plane.settings.write_buffer_bytes_max)
        self._open_ones.add(self)
        self._metrics.relay_connections += 1
        self._transport.write(encode_hello(self._plane.settings.node))
        self.deadline = self._plane.now() + IDLE_TIMEOUT_S

    def connection_lost(self, exc: Exception | None) -> None:
        """The other node is gone, or wants no more of this session."""
        if self._transport is None:
            return  # it was not admitted
        self._plane.admission.leave("")
        self._transport = None
        self.deadline = NEVER
        self._open_ones.discard(self)
        self._metrics.relay_connections -= 1
        machine, self._machine = self._machine, None
        if machine is not None and exc is None:
            machine.end_tunnel()
        elif machine is not None:
            machine.reset()
        self._end_session()

    def data_received(self, data: bytes) -> None:
        """Take frames."""
        try:
            for kind, payload in self._frames.feed(data):
                self._take_frame(kind, payload)
        except FrameError:
            self._metrics.turn_away("malformed")
            self.abort()

    def pause_writing(self) -> None:
        """The other node does not read: stop the machine."""
        self._blocked = True
        if self._machine is not None:
            self._machine.pause_reading()
        self.deadline = self._plane.now() + self._plane.settings.send_timeout_s

    def resume_writing(self) -> None:
        """The other node reads again."""
        self._blocked = False
        self.deadline = NEVER if self._order is not None else self._plane.now() + IDLE_TIMEOUT_S
        if self._machine is not None:
            self._machine.resume_reading()

    def handle_deadline(self) -> None:
        """Nothing was wanted, or nothing was taken, for too long.

        In a session it is the other node that says how long nothing may happen, and the kernel finds out
        when there is none any more.
        """
        if self._machine is not None and not self._blocked:
            self._machine.deadline = NEVER
        else:
            self.abort()

    # What the server calls

    def drain(self) -> None:
        """Ask for no more sessions; the other node closes the connection when it hears of it.

        A session that it has opened before is served: nobody else may reach the machine.
        """
        if not self._leaving and self._transport is not None:
            self._leaving = True
            self._transport.write(encode_frame(GOODBYE, b""))

    def close_idle(self) -> None:
        """End the connection if there is no session."""
        if self.is_idle and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._transport.abort()

    # Frames

    def _take_frame(self, kind: int, payload: bytes) -> None:
        if kind == DATA:
            # Without a session it is for one that we have ended already.
            if self._machine is not None:
                self._machine.write_tunnelled(payload)
            elif self._order is not None:
                self._keep(payload)
        elif kind == OPEN:
            if self._order is not None:
                raise FrameError("a session within another")
            self._open(parse_open(payload))
        elif kind == RELEASE:
            received = parse_release(payload)
            if self._machine is not None:
                self._leave_machine(self._machine, keep=received == self._sent)
        else:
            raise FrameError("an unknown frame")

    def _keep(self, data: bytes) -> None:
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes > self._plane.settings.write_buffer_bytes_max:
            self.pause_reading()

    def _open(self, order: Order) -> None:
        """Begin a session, if the machine may be reached from here."""
        self._order = order
        self.deadline = NEVER
        table = self._plane.table
        target, service = table.machine(order.machine), table.service(order.app, order.service)
        if self._plane.draining:
            self.drain()  # it came when others had been told
        if self._plane.shedding:
            self._refuse(OVERLOADED, "this node takes no more requests")
        elif target is None or target.app != order.app or service is None:
            self._refuse(CONNECT_FAILED, "this node does not know the machine")
        elif order.passed >= PASSED_MAX and self._peers.ways.find(target, None, order.passed) is Way.NODE:
            self._refuse(CONNECT_FAILED, "the machine is not this node's, and enough nodes have passed it on")
        else:
            self._target = target
            table.count_relayed(target.id, 1)
            self._metrics.relaying += 1
            port = target.port or order.port
            machine = self._peers.acquire(target, port, service, self, fresh=order.fresh, passed=order.passed)
            if machine is not None:
                self.handle_connected(machine)

    # What the pool calls

    def reach_timeout_s(self) -> float:
        """Return how long the connection to the machine may take."""
        least_s = 0.001 if self._order is None else self._order.timeout_ms / 1_000
        return max(0.001, min(self._plane.settings.connect_timeout_s, least_s))

    def announcement(self) -> bytes:
        """Nothing: a PROXY header comes with the other bytes."""
        return b""

    def handle_connected(self, machine: Machine) -> None:
        """The machine is reached: what is here is for it."""
        # The only machines that there are outside of tests of the core.
        upstream = cast("Upstream", machine)
        if self._order is None or self._transport is None:
            upstream.release()
            return
        self._machine = upstream
        self._metrics.relayed += 1
        self._sent = 0
        self._transport.write(encode_frame(OPENED, KEPT if upstream.reused else FRESH))
        upstream.start_tunnel(self)
        waiting, self._waiting = self._waiting, []
        self._waiting_bytes = 0
        self.resume_reading()
        for data in waiting:
            upstream.write_tunnelled(data)

    def handle_connect_failed(self, code: str, detail: str) -> None:
        """The machine is not reached."""
        self._refuse(code, detail)

    def handle_shortage(self, code: str, detail: str) -> None:
        """Here is no room for a connection."""
        self._refuse(code, detail)

    # What the machine's side calls

    def write_tunnelled(self, data: bytes) -> None:
        """Pass on bytes of the machine."""
        if self._transport is not None:
            self._sent += len(data)
            self._transport.writelines(encode_data(data))

    def pause_reading(self) -> None:
        """Stop reading what the machine is to get."""
        if not self._paused and self._transport is not None:
            self._paused = True
            hold_reading(self._transport)

    def resume_reading(self) -> None:
        """Go on reading what the machine is to get."""
        if self._paused and self._transport is not None:
            self._paused = False
            go_on_reading(self._transport)

    def end_tunnel(self) -> None:
        """The machine has ended its connection."""
        machine, self._machine = self._machine, None
        if self._transport is not None and machine is not None:
            self._transport.write(encode_frame(ENDED, CLEAN if machine.ended_cleanly else LOST))
            self._end_session()

    # Ends

    def _refuse(self, code: str, reason: str) -> None:
        if self._transport is not None and self._order is not None:
            self._metrics.refuse(code)
            self._transport.write(encode_refusal(code, reason))
            self._end_session()

    def _leave_machine(self, machine: Upstream, *, keep: bool) -> None:
        self._machine = None
        if keep:
            machine.leave_tunnel()
        else:
            machine.end_tunnel()
        self._end_session()

    def _end_session(self) -> None:
        self._order = None
        self._waiting = []
        self._waiting_bytes = 0
        target, self._target = self._target, None
        if target is not None:
            self._plane.table.count_relayed(target.id, -1)
            self._metrics.relaying -= 1
            self._plane.queue.offer(target.app)
        if self._transport is not None:
            self.deadline = self._plane.now() + IDLE_TIMEOUT_S
            self.resume_reading()
