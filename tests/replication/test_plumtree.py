"""One node's part in the broadcast: messages and time in, outputs out."""

from replication.core.change import EncodedChangeset
from replication.core.clock import SiteId
from replication.core.plumtree import Deliver, NeedSync, Plumtree, PlumtreeSettings, Resend, SendFrame
from replication.core.wire import Graft, IHave, Prune, Push

A, B, C, FAR = (SiteId(bytes([n]) * 16) for n in range(4))


def changeset(version: int = 1, payload: bytes = b"x") -> EncodedChangeset:
    return EncodedChangeset(FAR, version, payload)


class Node:
    """A core with neighbours A, B, C and a set of what the store has."""

    def __init__(self, known: dict[SiteId, float] | None = None, **settings: float) -> None:
        self.stored: set[tuple[SiteId, int]] = set()
        distances = {A: float("inf"), B: 10.0, C: 20.0, **(known or {})}
        self.tree = Plumtree(
            PlumtreeSettings(**settings),
            has=lambda site, version: (site, version) in self.stored,
            distance=lambda site: distances[site],
        )
        for peer in (A, B, C):
            self.tree.handle_peer_up(peer)

    def take(self, peer: SiteId, message: object, now: float = 0) -> list:
        return self.tree.handle_message(peer, message, now)


def test_pushes_its_own_to_all_nearest_first():
    node = Node()
    assert node.tree.broadcast(changeset(), 0) == [SendFrame(peer, Push(changeset())) for peer in (B, C, A)]


def test_delivers_a_new_one_and_pushes_it_on_but_not_back():
    node = Node()
    assert node.take(C, Push(changeset())) == [
        Deliver(changeset()),
        SendFrame(B, Push(changeset())),
        SendFrame(A, Push(changeset())),
    ]


def test_prunes_the_link_that_brings_what_another_link_brought():
    node = Node()
    node.take(C, Push(changeset()))
    assert node.take(A, Push(changeset())) == [SendFrame(A, Prune())]
    assert node.tree.lazy == [A]


def test_keeps_the_last_link_of_the_tree_when_many_sources_speak_at_once():
    node = Node()
    node.tree.handle_peer_down(C)
    node.take(A, Push(changeset(1)))
    node.take(B, Push(changeset(2)))
    assert node.take(B, Push(changeset(1))) == [SendFrame(B, Prune())]
    assert node.take(A, Push(changeset(2))) == []
    assert node.tree.eager == [A]


def test_a_graft_waits_less_when_all_peers_are_near():
    node = Node(known={A: 5.0})
    node.take(A, IHave(((FAR, 1),)))
    assert node.tree.next_at() == 130


def test_does_not_prune_because_sync_was_faster():
    node = Node()
    node.stored.add((FAR, 1))
    assert node.take(A, Push(changeset())) == []
    assert A in node.tree.eager


def test_a_repetition_by_the_same_peer_is_not_pruned():
    node = Node()
    node.take(A, Push(changeset()))
    assert node.take(A, Push(changeset())) == []


def test_announces_to_those_who_pruned_it():
    node = Node()
    node.take(A, Prune())
    sent = node.tree.broadcast(changeset(1), 0) + node.tree.broadcast(changeset(2), 1)
    assert A not in {output.peer for output in sent}
    assert node.tree.next_at() == 20
    assert node.tree.tick(20) == [SendFrame(A, IHave(((FAR, 1), (FAR, 2))))]
    assert node.tree.tick(500) == []


def test_a_link_is_untried_until_something_was_pushed_along_it_and_again_when_the_tree_breaks():
    node = Node()
    assert node.tree.untried == [A, B, C]
    node.take(C, Push(changeset()))
    assert node.tree.untried == []
    node.tree.handle_peer_down(B)
    node.tree.handle_peer_up(B)
    assert node.tree.untried == [B]
    for peer in (A, B, C):
        node.take(peer, Prune())
    assert node.tree.untried == []
    node.tree.handle_peer_down(C)
    assert node.tree.untried == [A, B]


def test_grafts_what_was_announced_and_did_not_come():
    node = Node()
    node.take(A, Prune())
    assert node.take(A, IHave(((FAR, 1), (FAR, 2))), 10) == []
    assert node.tree.tick(309) == []
    assert node.tree.tick(310) == [SendFrame(A, Graft(((FAR, 1), (FAR, 2))))]
    assert A in node.tree.eager


def test_does_not_graft_what_came_meanwhile():
    node = Node()
    node.take(A, IHave(((FAR, 1), (FAR, 2))))
    node.take(B, Push(changeset(1)))
    node.stored.add((FAR, 2))
    assert node.tree.tick(1_000) == []


def test_asks_the_next_announcer_then_for_a_sync():
    node = Node()
    node.take(A, IHave(((FAR, 1),)))
    node.take(B, IHave(((FAR, 1),)))
    assert node.tree.tick(300) == [SendFrame(A, Graft(((FAR, 1),)))]
    assert node.tree.tick(600) == [SendFrame(B, Graft(((FAR, 1),)))]
    assert node.tree.tick(900) == [NeedSync(B)]
    assert node.tree.next_at() is None


def test_passes_over_an_announcer_that_went_away():
    node = Node()
    node.take(A, IHave(((FAR, 1),)))
    node.take(B, IHave(((FAR, 1),)))
    node.tree.handle_peer_down(A)
    assert node.tree.tick(300) == [SendFrame(B, Graft(((FAR, 1),)))]


def test_answers_a_graft_from_memory_or_from_the_log_and_is_in_the_tree_again():
    node = Node()
    node.take(A, Prune())
    node.take(B, Push(changeset(1)))
    node.stored.add((FAR, 2))
    assert node.take(A, Graft(((FAR, 1), (FAR, 2), (FAR, 3)))) == [
        SendFrame(A, Push(changeset(1))),
        Resend(A, (FAR, 2)),
    ]
    assert A in node.tree.eager


def test_pushes_to_all_that_are_left_when_the_last_branch_breaks():
    node = Node()
    node.take(A, Prune())
    node.take(B, Prune())
    node.tree.handle_peer_down(C)
    assert set(node.tree.eager) == {A, B}


def test_delivers_again_what_could_not_be_applied():
    node = Node()
    node.take(A, Push(changeset()))
    node.tree.forget((FAR, 1))
    assert Deliver(changeset()) in node.take(B, Push(changeset()))


def test_what_a_sync_brought_is_named_to_all_but_the_one_it_came_from_and_makes_them_sync():
    node, other = Node(), Node()
    named = node.tree.announce_news((FAR, 7), B)
    assert [output.peer for output in named] == [A, C]
    assert other.take(C, named[0].message) == [NeedSync(C)]
    other.stored.add((FAR, 7))
    assert other.take(C, named[0].message) == []


def test_a_message_from_somebody_without_a_lasting_link_is_taken_all_the_same():
    node = Node()
    assert Deliver(changeset()) in node.take(FAR, Push(changeset()))
    assert FAR not in node.tree.eager


def test_what_is_remembered_is_bounded():
    node = Node(recent_max=10, cache_bytes_max=100, announced_max=5, missing_max=7)
    node.take(A, Prune())
    for version in range(1, 100):
        node.tree.broadcast(changeset(version, b"x" * 30), 0)
    assert len(node.tree._recent) == 10
    assert node.tree._cache_bytes <= 100
    (announcement,) = node.tree.tick(50)
    assert len(announcement.message.ids) == 5
    node.take(B, IHave(tuple((FAR, version) for version in range(1_000, 2_000))))
    assert len(node.tree._missing) == 7
    assert node.tree.counters["announcements_dropped"] > 900


def test_changesets_without_bytes_are_bounded_too():
    node = Node(recent_max=10)
    for version in range(1, 100):
        node.tree.broadcast(changeset(version, b""), 0)
    assert len(node.tree._cache) == 10
