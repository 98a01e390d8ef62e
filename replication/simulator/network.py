"""The network between simulated nodes: datagrams that may get lost, streams that keep order or break.

Decides what arrives, when and how often. Knows nothing of what it carries. Invariant: what one stream
delivers is a prefix of what was sent on it; a datagram arrives as it was sent, any number of times.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from replication.core.member import Address, MemberInfo
from replication.simulator.events import EventQueue
from replication.simulator.regions import REGIONS, compute_one_way_us
from replication.simulator.trace import Trace
from replication.transport import DRAIN_BYTES, SEND_BYTES_MAX, USER_TIMEOUT_MS

# A retransmission timer's floor, doubled up to the next: Linux's, and what a stalled path is tried at.
RETRANSMIT_US = 200_000
RETRANSMIT_MAX_US = 3_000_000
BROKEN_US = USER_TIMEOUT_MS * 1000
# Of each packet, beyond its content: IP, UDP or TCP, and the seal.
OVERHEAD_BYTES = 80
BYTES_PER_S = 125_000_000  # a gigabit, for all that one node sends


class Host(Protocol):
    """A node as the network sees it."""

    index: int
    running: bool

    @property
    def info(self) -> MemberInfo:
        """Who answers here."""

    def enter(self, act: Callable[[], None]) -> None:
        """Let the node do something, when it gets to it."""

    def handle_datagram(self, data: bytes) -> None:
        """Take a datagram."""

    def handle_frame(self, link: "Link", data: bytes) -> None:
        """Take a frame of a stream."""

    def handle_link_up(self, link: "Link") -> None:
        """Take note of a link."""

    def handle_link_down(self, link: "Link") -> None:
        """Take note that a link is gone."""


@dataclass(slots=True)
class Conditions:
    """What is wrong with the network now; set and cleared by faults."""

    usual_loss: float = 0.0  # without any fault
    loss: float = 0.0  # of datagrams; on a stream it costs a retransmission
    duplicate: float = 0.0  # of datagrams
    reorder_us: int = 0  # a datagram may be late by up to this
    bytes_per_s: int = BYTES_PER_S
    cuts: Counter[tuple[int, int]] = field(default_factory=Counter)  # (from, to): how many faults cut it


class Link:
    """One node's end of a stream."""

    def __init__(self, network: "Network", owner: Host, *, dialled: bool, lasting: bool) -> None:
        self.dialled = dialled
        self.lasting = lasting
        self.peer: MemberInfo  # who the other side said it is; set when both ends are made
        self.other: Link  # the other end; set when both ends are made
        self.owner = owner
        self.is_open = True
        self._network = network
        self._queue: deque[tuple[int, bytes]] = deque()  # sent and not arrived: due at, frame
        self._queued_bytes = 0
        self._due_us = 0  # when the last frame that was sent is due
        self._stalled_us: int | None = None  # since when the path has been cut
        self._attempts = 0  # retransmissions since then
        self.is_paused = False
        self._waits: list[Callable[[], None]] = []  # for the peer to keep up

    @property
    def is_writable(self) -> bool:
        """Whether the peer keeps up."""
        return self._queued_bytes < DRAIN_BYTES

    def when_writable(self, act: Callable[[], None]) -> None:
        """Call `act` when the link is writable; never when it closes first."""
        self._waits.append(act)
        self._network.queue.after(0, self._call_waits)

    def _call_waits(self) -> None:
        while self._waits and self.is_open and self.is_writable:
            self.owner.enter(self._waits.pop(0))

    def pause(self) -> None:
        """Hand in no more frames for now; the sender sees them as not taken."""
        self.is_paused = True

    def resume(self) -> None:
        """Go on handing in frames."""
        if self.is_paused:
            self.is_paused = False
            self._network.queue.after(0, self.other.deliver)

    def retire(self) -> None:
        """Close: what is queued is of no use any more when a session is over."""
        self.close()

    def send(self, frame: bytes) -> bool:
        """Queue a frame; False when it was dropped, as the link is gone or the peer too slow."""
        if not self.is_open or (self._queued_bytes and self._queued_bytes + len(frame) > SEND_BYTES_MAX):
            return False
        network = self._network
        network.counters["frames"] += 1
        network.counters["bytes"] += len(frame)
        if network.on_frame is not None:
            network.on_frame(frame)
        self._due_us = max(self._due_us, network.compute_frame_due_us(self, len(frame)))
        self._queue.append((self._due_us, frame))
        self._queued_bytes += len(frame)
        if len(self._queue) == 1:
            network.queue.at(self._due_us, self.deliver)
        return True

    def close(self) -> None:
        """Close at once; what was queued is lost, and the other side hears of it if it can."""
        if not self.is_open:
            return
        self.is_open = False
        self.owner.handle_link_down(self)
        self.abandon(told=True)

    def abandon(self, *, told: bool) -> None:
        """Let the other end break: soon, or, when it cannot be told, when its own patience ends."""
        network = self._network
        here, there = self.owner.index, self.other.owner.index
        if not told or network.is_cut(here, there):
            delay_us = BROKEN_US
        else:
            delay_us = network.compute_delay_us(here, there)
        network.queue.after(delay_us, self.other.break_)

    def break_(self) -> None:
        """Take note that the stream is gone."""
        if self.is_open:
            self.is_open = False
            self.owner.enter(lambda: self.owner.handle_link_down(self))

    def deliver(self) -> None:
        """Hand over the first frame if it is due, and see to the next."""
        network = self._network
        if not self.is_open or not self._queue or self.other.is_paused:
            return
        if self._queue[0][0] > network.queue.now_us:
            network.queue.at(self._queue[0][0], self.deliver)
            return
        if network.is_cut(self.owner.index, self.other.owner.index):
            network.counters["frames_stalled"] += 1
            if self._stalled_us is None:
                self._stalled_us = network.queue.now_us
            if network.queue.now_us - self._stalled_us > BROKEN_US:
                self.break_()
                self.other.break_()
                return
            wait_us = min(RETRANSMIT_MAX_US, RETRANSMIT_US << self._attempts)
            self._attempts += 1
            network.queue.after(wait_us, self.deliver)
            return
        self._stalled_us = None
        self._attempts = 0
        _, frame = self._queue.popleft()
        self._queued_bytes -= len(frame)
        if not self.other.is_open:
            # The other side has closed, and could not tell: its kernel answers with a reset.
            network.queue.after(
                network.compute_delay_us(self.other.owner.index, self.owner.index), self.break_
            )
            return
        network.trace.add(
            network.queue.now_us, f"frame n{self.owner.index} n{self.other.owner.index} {len(frame)}"
        )
        other = self.other
        other.owner.enter(lambda: other.owner.handle_frame(other, frame) if other.is_open else None)
        self._call_waits()
        if self._queue:
            network.queue.at(self._queue[0][0], self.deliver)


class Network:
    """Delays, faults and what is under way."""

    def __init__(self, queue: EventQueue, trace: Trace, seed: int, *, regions: int, loss: float) -> None:
        self.queue = queue
        self.trace = trace
        self.conditions = Conditions(usual_loss=loss, loss=loss)
        self.counters: Counter[str] = Counter()
        self.on_frame: Callable[[bytes], None] | None = None  # called for each that is sent, for who counts
        # A stream for each kind of chance, so that one fault more does not change all others.
        self._loss = Random(f"{seed}/network/loss")
        self._duplicate = Random(f"{seed}/network/duplicate")
        self._reorder = Random(f"{seed}/network/reorder")
        self._jitter = Random(f"{seed}/network/jitter")
        self._hosts: dict[Address, Host] = {}
        self._free_us: dict[int, int] = {}  # when a node's uplink has sent all that it was given
        self._regions = regions
        self._matrix: dict[tuple[int, int], int] = {}

    def attach(self, address: Address, host: Host) -> None:
        """Route an address to a node."""
        self._hosts[address] = host

    def is_cut(self, source: int, target: int) -> bool:
        """Return whether nothing gets from one node to another."""
        return self.conditions.cuts.get((source, target), 0) > 0

    def compute_delay_us(self, source: int, target: int) -> int:
        """Return how long the path takes now: a tenth of jitter on top of the distance."""
        pair = (source % self._regions, target % self._regions)
        base = self._matrix.get(pair)
        if base is None:
            base = self._matrix[pair] = compute_one_way_us(REGIONS[pair[0]], REGIONS[pair[1]])
        return base + int(base * 0.1 * self._jitter.random()) + self._jitter.randrange(200)

    def _compute_departure_us(self, source: int, size: int) -> int:
        start = max(self.queue.now_us, self._free_us.get(source, 0))
        took = (size + OVERHEAD_BYTES) * 1_000_000 // self.conditions.bytes_per_s
        self._free_us[source] = start + took
        return start + took

    def compute_frame_due_us(self, link: Link, size: int) -> int:
        """Return when a frame that is sent now arrives, if the path is open."""
        source, target = link.owner.index, link.other.owner.index
        due_us = self._compute_departure_us(source, size) + self.compute_delay_us(source, target)
        if self.conditions.loss and self._loss.random() < self.conditions.loss:
            self.counters["frames_retransmitted"] += 1
            due_us += RETRANSMIT_US + self.compute_delay_us(source, target)
        return due_us

    def send_datagram(self, source: Host, to: Address, data: bytes) -> None:
        """Send, and forget."""
        self.counters["datagrams"] += 1
        self.counters["datagram_bytes"] += len(data)
        self.counters["bytes"] += len(data)
        departure_us = self._compute_departure_us(source.index, len(data))
        target = self._hosts.get(to)
        conditions = self.conditions
        if target is None or (conditions.loss and self._loss.random() < conditions.loss):
            self.counters["datagrams_lost"] += 1
            return
        copies = 1
        if conditions.duplicate and self._duplicate.random() < conditions.duplicate:
            self.counters["datagrams_duplicated"] += 1
            copies = 2
        for _ in range(copies):
            due_us = departure_us + self.compute_delay_us(source.index, target.index)
            if conditions.reorder_us:
                due_us += self._reorder.randrange(conditions.reorder_us)
            self.queue.at(due_us, lambda: self._arrive(source.index, to, data))

    def _arrive(self, source: int, to: Address, data: bytes) -> None:
        target = self._hosts[to]  # who lives there by now
        if self.is_cut(source, target.index):
            self.counters["datagrams_cut"] += 1
            return
        if not target.running:
            self.counters["datagrams_lost"] += 1
            return
        self.trace.add(self.queue.now_us, f"datagram n{source} n{target.index} {len(data)}")
        target.enter(lambda: target.handle_datagram(data))

    def dial(
        self,
        source: Host,
        address: Address,
        *,
        lasting: bool,
        timeout_ms: float,
        on_done: Callable[[Link | None], None],
    ) -> None:
        """Open a stream; `on_done` gets our end, or None when nobody answered in time."""
        target = self._hosts.get(address)
        self.counters["dials"] += 1
        if target is None or target is source:
            self.queue.after(RETRANSMIT_US, lambda: source.enter(lambda: on_done(None)))
            return
        # The handshake of TCP, then the seals' and the hellos in one.
        round_trip_us = self.compute_delay_us(source.index, target.index) + self.compute_delay_us(
            target.index, source.index
        )
        self.queue.after(
            2 * round_trip_us,
            lambda: self._shake_hands(source, address, lasting, int(timeout_ms * 1000), on_done),
        )

    def _shake_hands(
        self,
        source: Host,
        address: Address,
        lasting: bool,
        timeout_us: int,
        on_done: Callable[[Link | None], None],
    ) -> None:
        target = self._hosts[address]
        there, here = source.index, target.index
        if self.is_cut(there, here) or self.is_cut(here, there):
            self.queue.after(timeout_us, lambda: source.enter(lambda: on_done(None)))
            return
        if not target.running or not source.running or target.info.site == source.info.site:
            source.enter(lambda: on_done(None))
            return
        ours = Link(self, source, dialled=True, lasting=lasting)
        theirs = Link(self, target, dialled=False, lasting=lasting)
        ours.other, theirs.other = theirs, ours
        ours.peer, theirs.peer = target.info, source.info
        target.enter(lambda: target.handle_link_up(theirs))
        source.enter(lambda: on_done(ours))
