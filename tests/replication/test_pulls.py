"""Sync sessions from the side that asks: what they wait for, and how they end."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from replication.core.change import EncodedChangeset
from replication.core.clock import SiteId
from replication.core.member import MemberInfo
from replication.core.pull import Answer
from replication.core.versions import VersionRanges
from replication.core.wire import (
    Members,
    SnapshotAsk,
    SnapshotChunk,
    SyncAsk,
    SyncBusy,
    SyncChanges,
    SyncDone,
    SyncOpen,
    SyncPart,
    SyncState,
)
from replication.pulls import WAITING_MAX, Failed, Puller
from tests.fakes.host import FakeHost
from tests.fakes.links import FakeLink

if TYPE_CHECKING:
    from replication.host import Spool

US, PEER = SiteId(b"u" * 16), SiteId(b"p" * 16)


def changeset(version: int) -> EncodedChangeset:
    return EncodedChangeset(PEER, version, b"x")


class Pulling:
    """A puller whose changes are applied when the test says so."""

    def __init__(self) -> None:
        self.host = FakeHost(None)
        self.counters: Counter[str] = Counter()
        self.seen: dict[SiteId, VersionRanges] = {}
        self.applying: list[tuple[list[int], Callable[[int], None], Failed]] = []
        self.adopting: list[tuple[Spool, Callable[[], None], Failed]] = []
        self.payloads: list[bytes] = []
        self.over: list[tuple[SiteId, int, str]] = []
        self.puller = Puller(
            self.host,
            US,
            self.counters,
            seen=lambda: self.seen,
            apply=self._apply,
            adopt=lambda *adoption: self.adopting.append(adoption),
            members=lambda: Members(()),
            on_over=lambda site, received, error: self.over.append((site, received, str(error))),
            timeout_ms=1_000,
        )
        self.link = FakeLink(MemberInfo(PEER, "p", "10.0.0.1", 1, 1), on_close=self.puller.handle_link_down)

    def _apply(self, batch: Sequence[EncodedChangeset], done: Callable[[int], None], failed: Failed) -> None:
        self.applying.append(([item.version for item in batch], done, failed))
        self.payloads += [item.payload for item in batch]

    def begin(self, *, borrowed: bool = False) -> int:
        """Begin a session and return its number."""
        self.puller.begin(PEER, self.link, borrowed=borrowed)
        opened = self.link.frames[-1]
        assert isinstance(opened, SyncOpen)
        return opened.session

    def answer(self, *answers: Answer) -> None:
        for answer in answers:
            self.puller.handle_answer(self.link, answer)

    def ask(self, upto: int) -> int:
        number = self.begin()
        self.answer(SyncState(number, {PEER: ((1, upto),)}, {PEER: 1}))
        assert self.link.frames[-1] == SyncAsk(number, ((PEER, 1, upto),))
        return number


def test_a_peer_that_has_nothing_more_ends_the_session_at_once() -> None:
    pulling = Pulling()
    number = pulling.begin(borrowed=True)
    pulling.answer(SyncState(number, {}, {}))
    assert pulling.over == [(PEER, 0, "None")]
    assert pulling.link.is_retired


def test_the_link_is_paused_while_answers_wait_for_one_that_is_applied() -> None:
    pulling = Pulling()
    number = pulling.ask(9)
    pulling.answer(*(SyncChanges(number, (changeset(version),)) for version in range(1, WAITING_MAX + 2)))
    assert pulling.link.is_paused
    assert [versions for versions, *_ in pulling.applying] == [[1]], "one at a time"
    pulling.applying[0][1](1)
    assert not pulling.link.is_paused
    assert [versions for versions, *_ in pulling.applying] == [[1], [2]]


def test_rounds_go_on_until_one_brings_nothing() -> None:
    pulling = Pulling()
    number = pulling.ask(2)
    pulling.answer(SyncChanges(number, (changeset(1), changeset(2))), SyncDone(number, complete=True))
    pulling.applying[0][1](2)
    again = pulling.link.frames[-1]
    assert isinstance(again, SyncOpen)
    assert again.session != number
    pulling.seen[PEER] = VersionRanges([(1, 2)])
    pulling.answer(SyncState(again.session, {PEER: ((1, 2),)}, {PEER: 1}))
    assert pulling.over == [(PEER, 2, "None")]


def test_a_snapshot_is_kept_and_adopted_when_it_is_whole() -> None:
    pulling = Pulling()
    number = pulling.begin()
    pulling.answer(SyncState(number, {PEER: ((1, 9),)}, {PEER: 5}))
    assert pulling.link.frames[-1] == SnapshotAsk(number)
    pulling.answer(SnapshotChunk(number, b"1"), SnapshotChunk(number, b"2"))
    assert not pulling.adopting
    pulling.answer(SyncDone(number, complete=True))
    spool, done, _ = pulling.adopting[0]
    assert list(spool.read()) == [b"1", b"2"]
    done()
    assert pulling.host.spools[0].is_closed
    assert isinstance(pulling.link.frames[-1], SyncOpen), "what was written meanwhile is asked for"


def test_sessions_end_with_the_link_with_a_refusal_and_with_what_applying_raises() -> None:
    pulling = Pulling()
    pulling.begin()
    pulling.link.close()
    assert pulling.over[-1][2] == "link_lost"
    pulling.link.is_closed = False
    pulling.answer(SyncBusy(pulling.begin()))
    assert pulling.over[-1][2] == "busy"
    number = pulling.ask(1)
    pulling.answer(SyncChanges(number, (changeset(1),)))
    pulling.applying[-1][2](OSError("disk"))
    assert pulling.over[-1][2] == "disk"
    assert pulling.counters["failed_OSError"] == 1
    pulling.answer(SyncDone(number, complete=True))
    assert pulling.counters["answers_late"] == 1


def test_a_peer_that_goes_silent_is_given_up_and_one_that_is_applied_is_not() -> None:
    pulling = Pulling()
    number = pulling.ask(2)
    pulling.answer(SyncChanges(number, (changeset(1),)))
    pulling.host.fire()  # it moved
    pulling.host.fire()  # it is being applied, which may take long
    assert pulling.over == []
    pulling.applying[0][1](1)
    pulling.host.fire()
    assert pulling.over == [(PEER, 0, "timeout")]
    assert pulling.link.is_closed
    assert not pulling.host.timers, "nothing is watched any more"


def test_what_is_applied_after_the_end_changes_nothing() -> None:
    pulling = Pulling()
    number = pulling.ask(1)
    pulling.answer(SyncChanges(number, (changeset(1),)))
    pulling.link.close()
    pulling.applying[0][1](1)
    assert pulling.over == [(PEER, 0, "link_lost")]


def test_parts_make_one_changeset_and_a_later_session_goes_on_where_one_ended() -> None:
    pulling = Pulling()
    number = pulling.ask(3)
    pulling.answer(SyncPart(number, PEER, 2, 10, 0, b"01234"))
    assert not pulling.applying
    pulling.link.close()
    pulling.link.is_closed = False
    number = pulling.begin()
    pulling.answer(SyncState(number, {PEER: ((1, 3),)}, {PEER: 1}))
    assert pulling.link.frames[-1] == SyncAsk(number, ((PEER, 2, 2), (PEER, 1, 3)), 5)
    pulling.answer(SyncPart(number, PEER, 2, 10, 5, b"56789"))
    assert [versions for versions, *_ in pulling.applying] == [[2]]
    assert pulling.payloads == [b"0123456789"]


def test_what_has_come_meanwhile_is_not_asked_for_again() -> None:
    pulling = Pulling()
    number = pulling.ask(3)
    pulling.answer(SyncPart(number, PEER, 2, 10, 0, b"01234"))
    pulling.link.close()
    pulling.link.is_closed = False
    pulling.seen[PEER] = VersionRanges([(1, 2)])
    number = pulling.begin()
    pulling.answer(SyncState(number, {PEER: ((1, 3),)}, {PEER: 1}))
    assert pulling.link.frames[-1] == SyncAsk(number, ((PEER, 3, 3),), 0)


def test_parts_that_do_not_fit_together_end_the_session() -> None:
    for wrong in (3, 6):
        pulling = Pulling()
        number = pulling.ask(3)
        pulling.answer(SyncPart(number, PEER, 2, 10, 0, b"01234"), SyncPart(number, PEER, 2, 10, wrong, b"5"))
        assert pulling.over == [(PEER, 0, "part")]


def test_a_chunk_in_pieces_is_kept_as_one() -> None:
    pulling = Pulling()
    number = pulling.begin()
    pulling.answer(SyncState(number, {PEER: ((1, 9),)}, {PEER: 5}))
    pulling.answer(
        SnapshotChunk(number, b"1", more=True), SnapshotChunk(number, b"2"), SnapshotChunk(number, b"3")
    )
    assert pulling.host.spools[0].chunks == [b"12", b"3"]


def test_a_peer_that_reads_a_snapshot_for_long_is_not_given_up() -> None:
    pulling = Pulling()
    number = pulling.begin()
    pulling.answer(SyncState(number, {PEER: ((1, 9),)}, {PEER: 5}))
    for _ in range(5):
        pulling.answer(SnapshotChunk(number, b"", more=True))
        pulling.host.fire()
    assert pulling.over == []
    pulling.answer(SnapshotChunk(number, b"1"), SnapshotChunk(number, b"2"))
    assert pulling.host.spools[0].chunks == [b"1", b"2"]
