"""The law of the stable time, against a model that knows what everybody has.

Nodes write with skewed clocks, changesets and heartbeats arrive in any order or never, members learn of each
other at different times. Whatever happens: what a node calls stable has reached all members of its roll, and
the node has all that any of them wrote before it had that.
"""

import itertools
from dataclasses import dataclass, field
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from replication.core.clock import Hlc, HybridClock, SiteId, compute_ms
from replication.core.freshness import BeatDue, Freshness, FreshnessSettings
from replication.core.versions import VersionRanges

NODES_MAX = 5
# Every beat is overdue at once, so that a node asks for all of them.
HURRIED = FreshnessSettings(beat_interval_ms=0, beat_interval_per_member_ms=0)


@dataclass(frozen=True)
class Written:
    site: SiteId
    version: int
    hlc: Hlc
    known: frozenset[tuple[SiteId, int]]  # what its writer had at the time


@dataclass
class Node:
    site: SiteId
    offset_ms: int
    roll: set[SiteId]
    clock: HybridClock = field(default_factory=HybridClock)
    seen: dict[SiteId, VersionRanges] = field(default_factory=dict)
    dues: list[BeatDue] = field(default_factory=list)
    answers: list[tuple[BeatDue, int, Hlc]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.core = Freshness(self.site, HURRIED, Random(1), seen=lambda: self.seen)
        self.core.set_roll(self.roll)
        self.core.start(0)

    def head(self, site: SiteId) -> int:
        return self.seen[site].head if site in self.seen else 0

    def has(self, changeset: Written) -> bool:
        return changeset.site in self.seen and self.seen[changeset.site].contains(changeset.version)

    def take(self, changeset: Written) -> None:
        self.seen.setdefault(changeset.site, VersionRanges()).add(changeset.version, changeset.version)
        self.clock.observe(changeset.hlc)
        self.core.handle_seen(changeset.site)


class World:
    """Nodes, and all that was ever written."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.now_ms = 1_000_000
        sites = [SiteId(bytes([number]) * 16) for number in range(2 + self.rng.randrange(2))]
        self.nodes = [Node(site, self.offset_ms(), {*sites}) for site in sites]
        self.written: list[Written] = []
        self.was_stable = False

    def offset_ms(self) -> int:
        return self.rng.randrange(-3_000, 3_000)

    def wall_ms(self, node: Node) -> int:
        return self.now_ms + node.offset_ms

    # --- what may happen ---

    def wait(self, _node: Node, _peer: Node) -> None:
        self.now_ms += self.rng.randrange(1, 500)

    def jump(self, node: Node, _peer: Node) -> None:
        node.offset_ms = self.offset_ms()

    def write(self, node: Node, _peer: Node) -> None:
        known = frozenset((c.site, c.version) for c in self.written if node.has(c))
        hlc = node.clock.tick(self.wall_ms(node))
        self.written.append(Written(node.site, node.head(node.site) + 1, hlc, known))
        node.take(self.written[-1])

    def deliver(self, node: Node, _peer: Node) -> None:
        missing = [changeset for changeset in self.written if not node.has(changeset)]
        if missing:
            node.take(self.rng.choice(missing))

    def sync(self, node: Node, peer: Node) -> None:
        for changeset in self.written:
            if peer.has(changeset) and not node.has(changeset):
                node.take(changeset)

    def become_due(self, node: Node, _peer: Node) -> None:
        node.core.start(self.now_ms - 1_000)
        node.dues += [item for item in node.core.tick(self.now_ms, ()) if isinstance(item, BeatDue)]

    def ask_store(self, node: Node, _peer: Node) -> None:
        for due in node.dues:
            node.answers.append((due, node.head(node.site), node.clock.tick(self.wall_ms(node))))
        node.dues.clear()

    def make_beat(self, node: Node, _peer: Node) -> None:
        for due, version, hlc in node.answers:
            node.core.handle_own(due, version, hlc, self.now_ms)
        node.answers.clear()

    def pass_beats(self, node: Node, peer: Node) -> None:
        for question in node.core.export(self.now_ms):
            wall_ms = self.wall_ms(peer)
            for answer in peer.core.handle_beats(node.site, question.beats, self.now_ms, wall_ms):
                node.core.handle_beats(peer.site, answer.beats, self.now_ms, self.wall_ms(node))

    def beat(self, node: Node, peer: Node) -> None:
        """Beat, while other things go on between the steps of it."""
        steps = [self.become_due, self.ask_store, self.make_beat]
        for other in (self.write, self.sync, self.pass_beats):
            steps.insert(self.rng.randrange(len(steps) + 1), other)
        for step in steps:
            step(node, peer)
        self.pass_beats(peer, node)

    def learn(self, node: Node, peer: Node) -> None:
        node.roll |= peer.roll
        node.core.set_roll(node.roll)

    def join(self, node: Node, _peer: Node) -> None:
        if len(self.nodes) < NODES_MAX:
            site = SiteId(bytes([len(self.nodes)]) * 16)
            self.nodes.append(Node(site, self.offset_ms(), {site}))
            self.learn(self.nodes[-1], node)
            self.learn(node, self.nodes[-1])

    # --- the law ---

    def check(self) -> None:
        for node in self.nodes:
            stable = node.core.compute_stable_hlc()
            early = [c for c in self.written if c.hlc <= stable and c.site in node.roll]
            for member in self.nodes:
                lacking = [c for c in early if member.site in node.roll and not member.has(c)]
                assert not lacking, f"{member.site!r} lacks {lacking} that {node.site!r} calls stable"
            for changeset in self.written:
                if changeset.site in node.roll and not node.has(changeset):
                    blind = [c for c in early if (c.site, c.version) not in changeset.known]
                    assert not blind, f"{changeset} was written without {blind}, and is still to come"
            self.was_stable |= bool(early)

    def run(self, steps: int) -> None:
        often = [self.deliver, self.sync, self.pass_beats, self.pass_beats, self.write, self.beat, self.wait]
        usual = [self.become_due, self.ask_store, self.make_beat, self.learn]
        for _ in range(steps):
            act = self.rng.choice(often * 3 + usual + ([self.join, self.jump] * (self.rng.random() < 0.2)))
            act(self.rng.choice(self.nodes), self.rng.choice(self.nodes))
            self.check()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_what_is_called_stable_has_reached_everybody(seed):
    World(seed).run(150)


def test_the_law_is_put_to_the_test():
    worlds = [World(seed) for seed in range(20)]
    for world in worlds:
        world.run(150)
    assert sum(world.was_stable for world in worlds) > 10


def test_in_a_calm_cluster_stable_time_follows_the_clock():
    world = World(1)
    for round_ in range(6):
        for node in world.nodes:
            node.offset_ms = 0
            world.write(node, node)
            for peer in world.nodes:
                world.sync(peer, node)
        world.now_ms += 1_000
        for step in (world.become_due, world.ask_store, world.make_beat):
            for node in world.nodes:
                step(node, node)
        for node, peer in itertools.permutations(world.nodes, 2):
            world.pass_beats(node, peer)
        world.check()
        for node in world.nodes:
            behind_ms = world.now_ms - compute_ms(node.core.compute_stable_hlc())
            assert round_ < 2 or behind_ms == 1_000, round_
    assert world.was_stable
