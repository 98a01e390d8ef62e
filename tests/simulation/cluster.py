"""A cluster of bare cores in virtual time: a heap of events, a network with faults, one seed.

Time is in whole microseconds inside and milliseconds towards the cores. Every message goes through the
wire format, so that limits of size hold here too. A run is a function of its seed.
"""

import heapq
from collections import Counter
from collections.abc import Callable
from random import Random

from replication.core import plumtree, swim
from replication.core.change import EncodedChangeset
from replication.core.clock import SiteId
from replication.core.member import MemberInfo, MemberState
from replication.core.neighbours import plan_neighbours
from replication.core.plumtree import Plumtree, PlumtreeSettings
from replication.core.swim import Swim, SwimSettings
from replication.core.versions import VersionRanges
from replication.core.wire import Push, StreamPing, decode_datagram, decode_frame, encode

PORT = 7000


def address(index: int) -> tuple[str, int]:
    return (f"10.0.{index // 250}.{index % 250 + 1}", PORT)


class Node:
    """One node's cores, and what they reported."""

    def __init__(self, cluster: "Cluster", index: int, incarnation: int) -> None:
        self.cluster = cluster
        self.index = index
        self.site = SiteId(index.to_bytes(16, "big"))
        host, port = address(index)
        self.rng = Random(f"{cluster.seed}/{index}/{incarnation}")
        info = MemberInfo(self.site, f"node-{index}", host, port, incarnation)
        self.swim = Swim(info, cluster.swim_settings, self.rng)
        self.seen: dict[SiteId, VersionRanges] = {}
        self.tree = Plumtree(PlumtreeSettings(), has=self.has, distance=lambda _: 0.0)
        self.links: list[SiteId] = []
        self.events: list[tuple[float, SiteId, MemberState]] = []
        self.syncs_wanted = 0
        self.version = 0
        self.running = True
        self.wake_at: float | None = None

    def has(self, site: SiteId, version: int) -> bool:
        return site in self.seen and self.seen[site].contains(version)

    def state_of(self, other: "Node") -> MemberState | None:
        member = self.swim.members.get(other.site)
        return member.state if member is not None else None

    def broadcast(self, payload: bytes = b"x" * 100) -> tuple[SiteId, int]:
        self.version += 1
        self.seen.setdefault(self.site, VersionRanges()).add(self.version, self.version)
        changeset = EncodedChangeset(self.site, self.version, payload)
        self.run_tree(self.tree.broadcast(changeset, self.cluster.now_ms))
        return (self.site, self.version)

    def relink(self) -> None:
        reachable = {m.info.site: m.rtt_ms for m in self.swim.members.values() if m.is_reachable}
        for site in plan_neighbours(self.links, reachable, self.rng):
            if site not in self.links:
                self.links.append(site)
                self.tree.handle_peer_up(site)
                other = self.cluster.by_site[site]
                if self.site not in other.links:
                    other.links.append(self.site)
                    other.tree.handle_peer_up(self.site)

    def run_swim(self, outputs: list[swim.Output]) -> None:
        for output in outputs:
            match output:
                case swim.SendDatagram(to, message):
                    self.cluster.send_datagram(self, to, encode(message))
                case swim.ProbeStream(site, number):
                    self.cluster.probe_stream(self, site, number)
                case swim.MemberChanged(info, state, _):
                    self.events.append((self.cluster.now_ms, info.site, state))
                    if state in (MemberState.DEAD, MemberState.LEFT) and info.site in self.links:
                        self.links.remove(info.site)
                        self.tree.handle_peer_down(info.site)
                    self.relink()
        self.arm()

    def run_tree(self, outputs: list[plumtree.Output]) -> None:
        for output in outputs:
            match output:
                case plumtree.SendFrame(peer, message):
                    if isinstance(message, Push):
                        self.cluster.counters["pushes"] += 1
                    self.cluster.send_frame(self, self.cluster.by_site[peer], encode(message))
                case plumtree.Deliver(changeset):
                    ranges = self.seen.setdefault(changeset.site, VersionRanges())
                    assert not ranges.contains(changeset.version), "delivered twice"
                    ranges.add(changeset.version, changeset.version)
                case plumtree.NeedSync():
                    self.syncs_wanted += 1
        self.arm()

    def arm(self) -> None:
        due = [at for at in (self.swim.next_at(), self.tree.next_at()) if at is not None]
        if due and (self.wake_at is None or min(due) < self.wake_at):
            self.wake_at = min(due)
            self.cluster.at(self.wake_at, self.wake)

    def wake(self) -> None:
        if not self.running or self.wake_at is None or self.cluster.now_ms < self.wake_at:
            return
        self.wake_at = None
        self.run_swim(self.swim.tick(self.cluster.now_ms))
        self.run_tree(self.tree.tick(self.cluster.now_ms))


class Cluster:
    """The nodes, the network between them and its faults."""

    def __init__(self, count: int, *, seed: int = 1, loss: float = 0.0) -> None:
        self.seed = seed
        self.loss = loss  # of datagrams; streams are reliable while the nodes can reach each other
        self.datagrams_blocked: set[int] = set()  # nodes whose datagrams are all lost
        self.groups: dict[int, int] = {}  # nodes in different groups cannot reach each other
        self.swim_settings = SwimSettings()
        self.rng = Random(f"{seed}/network")
        self.counters: Counter[str] = Counter()
        self.trace: list[tuple[int, int, int, int]] = []
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._sequence = 0
        self._now_us = 0
        self.nodes: list[Node] = []
        self.by_site: dict[SiteId, Node] = {}
        for index in range(count):
            self.start(index)

    @property
    def now_ms(self) -> float:
        return self._now_us / 1000

    def start(self, index: int) -> Node:
        node = Node(self, index, incarnation=1_000_000 + int(self.now_ms))
        if index < len(self.nodes):
            self.nodes[index] = node
        else:
            self.nodes.append(node)
        self.by_site[node.site] = node
        node.swim.set_join_addresses([address(0), address(1)])
        node.run_swim(node.swim.start(self.now_ms))
        return node

    def crash(self, node: Node) -> None:
        node.running = False

    def partition(self, *groups: range) -> None:
        self.groups = {index: number for number, group in enumerate(groups) for index in group}

    def heal(self) -> None:
        self.groups = {}

    def can_reach(self, a: Node, b: Node) -> bool:
        return a.running and b.running and self.groups.get(a.index) == self.groups.get(b.index)

    # --- the network ---

    def at(self, when_ms: float, act: Callable[[], None]) -> None:
        self._sequence += 1
        when_us = max(self._now_us, -int(-when_ms * 1000 // 1))
        heapq.heappush(self._heap, (when_us, self._sequence, act))

    def send_datagram(self, source: Node, to: tuple[str, int], data: bytes) -> None:
        self.counters["datagrams"] += 1
        target = next((node for node in self.nodes if node.swim.me.address == to), None)
        if target is None or self.rng.random() < self.loss:
            self.counters["lost"] += 1
            return
        if {source.index, target.index} & self.datagrams_blocked:
            self.counters["blocked"] += 1
            return
        self.trace.append((self._now_us, source.index, target.index, len(data)))

        def arrive() -> None:
            if self.can_reach(source, target):
                target.run_swim(target.swim.handle_message(decode_datagram(data), self.now_ms))
            else:
                self.counters["cut"] += 1

        self.at(self.now_ms + 1 + 4 * self.rng.random(), arrive)

    def send_frame(self, source: Node, target: Node, data: bytes) -> None:
        self.counters["frames"] += 1
        self.trace.append((self._now_us, source.index, target.index, len(data)))

        def arrive() -> None:
            if self.can_reach(source, target):
                outputs = target.tree.handle_message(source.site, decode_frame(data), self.now_ms)
                target.run_tree(outputs)

        # A fixed delay per pair keeps a stream's frames in order.
        self.at(self.now_ms + 2 + (source.index * 7 + target.index) % 5, arrive)

    def probe_stream(self, source: Node, site: SiteId, number: int) -> None:
        target = self.by_site[site]
        decode_frame(encode(StreamPing(number)))

        def answer() -> None:
            if self.can_reach(source, target):
                self.counters["stream_acks"] += 1
                source.run_swim(source.swim.handle_stream_ack(site, number, self.now_ms))

        self.at(self.now_ms + 6, answer)

    # --- running ---

    def run(self, duration_ms: float) -> None:
        end_us = self._now_us + int(duration_ms * 1000)
        while self._heap and self._heap[0][0] <= end_us:
            self._now_us, _, act = heapq.heappop(self._heap)
            act()
        self._now_us = end_us

    def run_until(self, condition: Callable[[], bool], within_ms: float) -> float:
        """Run in steps until the condition holds; return how long it took, or fail."""
        started = self.now_ms
        while not condition():
            assert self.now_ms - started < within_ms, f"not within {within_ms} ms (seed {self.seed})"
            self.run(50)
        return self.now_ms - started

    def all_see(self, observers: list[Node], subjects: list[Node], state: MemberState) -> bool:
        return all(a.state_of(b) is state for a in observers for b in subjects if a is not b)

    def all_have(self, id_: tuple[SiteId, int]) -> bool:
        return all(node.has(*id_) for node in self.nodes if node.running)
