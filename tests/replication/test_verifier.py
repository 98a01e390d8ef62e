"""When tables are compared with whom, what is waited for before anything is merged, and how sessions end."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from replication.core.clock import SiteId
from replication.core.links import Link
from replication.core.member import Address, MemberInfo
from replication.core.needs import Seen, encode_seen
from replication.core.wire import (
    DigestAsk,
    DigestRanges,
    SnapshotChunk,
    StatesAsk,
    SyncBusy,
    SyncDone,
    SyncState,
)
from replication.host import SpoolError
from replication.schema import Schema
from replication.store import Store
from replication.verifier import WAIT_MS, Answer, Verifier, VerifySettings
from replication.verifying import read_range_states, read_ranges
from tests.fakes.host import FakeHost, ListSpool
from tests.fakes.links import FakeLink
from tests.fakes.verification import NOW, write_past_triggers

SQL = "CREATE TABLE a (k INTEGER PRIMARY KEY, v); CREATE TABLE b (k INTEGER PRIMARY KEY, v);"
OURS, THEIRS, WRITER = (SiteId(letter * 16) for letter in (b"o", b"t", b"w"))
TIMEOUT_MS = 10_000.0
SLICE_ROWS = 4


class Comparing:
    """A verifier whose peers answer when the test says so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stores = {site: self.open(site) for site in (OURS, THEIRS, WRITER)}
        self.ours = self.stores[OURS]
        self.host = FakeHost(self.ours)
        self.peers: dict[SiteId, Address] = {THEIRS: ("10.0.0.1", 1)}
        self.links: dict[SiteId, FakeLink] = {}
        self.asked: list[SiteId] = []
        self.seen: Seen | None = None  # what the verifier believes to be seen here, where that is not so
        self.is_reachable = True
        self.verifier = Verifier(
            self.host,
            VerifySettings(slice_rows=SLICE_ROWS, pause_ms=1, interval_ms=5_000, timeout_ms=TIMEOUT_MS),
            Random(1),
            peers=lambda: self.peers,
            borrow=self._borrow,
            seen=lambda: self.ours.seen() if self.seen is None else self.seen,
            is_gone=lambda _: False,
        )

    def open(self, site: SiteId, sql: str = SQL) -> Store:
        return Store.open(self.folder / f"{site.decode()}-{len(sql)}", Schema.parse(sql), site=site)

    def _borrow(self, site: SiteId, address: Address, done: Callable[[Link | None, bool], None]) -> None:
        assert address == self.peers[site]
        self.asked.append(site)
        link = FakeLink(MemberInfo(site, "p", *address, 1), on_close=self.verifier.handle_link_down)
        self.links[site] = link
        done(link if self.is_reachable else None, True)

    @property
    def link(self) -> FakeLink:
        return self.links[self.asked[-1]]

    def write(self, writer: SiteId, *statements: str) -> None:
        """Write, and let all see it."""
        _, commit = self.stores[writer].execute([(sql, ()) for sql in statements], NOW)
        assert commit is not None
        for store in self.stores.values():
            store.apply(commit.changesets, NOW)

    def damage(self, sql: str) -> None:
        path = self.ours.connection.execute("PRAGMA database_list").fetchone()[2]
        write_past_triggers(path, (sql,))

    def rows(self, table: str = "a") -> list[tuple[object, ...]]:
        return self.ours.connection.execute(f"SELECT k, v FROM {table} ORDER BY k").fetchall()

    def start(self) -> None:
        self.verifier.start()
        self.go_on()

    def fire(self, from_ms: float, upto_ms: float) -> None:
        """Let the latest timer of about that length come up."""
        timer = [timer for timer in self.host.timers if from_ms <= timer[0] <= upto_ms][-1]
        self.host.timers.remove(timer)
        timer[1]()
        self.host.settle()

    def go_on(self) -> None:
        """Let the pause before the next slice, or the next pass, be over."""
        self.fire(0, 10)

    def begin_pass(self) -> None:
        self.fire(1_000, 9_000)

    def look_again(self) -> None:
        """Let what is waited for be looked for again."""
        self.fire(WAIT_MS, WAIT_MS)

    def time_out(self) -> None:
        self.fire(TIMEOUT_MS, TIMEOUT_MS)

    def hand_in(self, *answers: Answer) -> None:
        for answer in answers:
            self.verifier.handle_answer(self.link, answer)
        self.host.settle()

    def compute_ranges(self) -> DigestRanges:
        ask = self.link.frames[-1]
        assert isinstance(ask, DigestAsk)
        ranges, is_last = read_ranges(self.stores[self.asked[-1]], ask.table, ask.after, ask.rows_max)
        return DigestRanges(ask.session, tuple(ranges), is_last)

    def answer_digests(self) -> DigestAsk:
        """Let the peer answer with its digests; return what was asked."""
        ask = self.link.frames[-1]
        assert isinstance(ask, DigestAsk)
        self.hand_in(self.compute_ranges())
        return ask

    def compute_states(self, chunk_bytes: int = 1_000) -> list[Answer]:
        peer, ask = self.stores[self.asked[-1]], self.link.frames[-1]
        assert isinstance(ask, StatesAsk)
        chunks = read_range_states(peer, ask.table, ask.lower, ask.upper, chunk_bytes)
        return [
            SyncState(ask.session, encode_seen(peer.seen()), {}),
            *(SnapshotChunk(ask.session, chunk) for chunk in chunks),
            SyncDone(ask.session, complete=True),
        ]


@pytest.fixture
def comparing(tmp_path: Path) -> Iterator[Comparing]:
    made = Comparing(tmp_path)
    yield made
    for store in made.stores.values():
        store.close()


@pytest.fixture
def differing(comparing: Comparing) -> Comparing:
    """One row of the peer's was changed behind our back, and the peer has been asked for it."""
    comparing.write(THEIRS, "INSERT INTO a VALUES (1, 'right')")
    comparing.damage("UPDATE a SET v = 'wrong'")
    comparing.start()
    comparing.answer_digests()
    assert isinstance(comparing.link.frames[-1], StatesAsk)
    return comparing


def test_slices_go_through_all_tables_and_passes_are_counted(comparing: Comparing) -> None:
    for number in range(10):
        comparing.write(THEIRS, f"INSERT INTO a VALUES ({number}, 1)", f"INSERT INTO b VALUES ({number}, 1)")
    comparing.start()
    asked = []
    for _ in range(6):
        asked.append(comparing.answer_digests())
        assert comparing.link.is_retired, "it was dialled for this"
        comparing.go_on()
    assert [ask.table for ask in asked] == ["a"] * 3 + ["b"] * 3
    assert [ask.after is None for ask in asked] == [True, False, False] * 2
    assert comparing.verifier.passes == 1
    assert comparing.verifier.counters == {"slices": 6, "strays_adopted": 0, "ranges_differing": 0}
    comparing.begin_pass()
    assert comparing.answer_digests().table == "a"


def test_what_differs_is_asked_for_and_healed(differing: Comparing) -> None:
    differing.hand_in(*differing.compute_states())
    assert differing.rows() == [(1, "right")]
    assert [change.pk for commit in differing.host.commits for change in commit.changes] == [(1,)]
    assert differing.verifier.counters["rows_healed"] == 1
    assert all(spool.is_closed for spool in differing.host.spools)
    differing.go_on()
    assert differing.answer_digests().table == "b"


def test_nothing_is_healed_before_all_is_here_that_the_peer_had_seen(differing: Comparing) -> None:
    differing.seen = {}
    differing.hand_in(*differing.compute_states())
    differing.look_again()
    assert differing.rows() == [(1, "wrong")]
    differing.seen = None
    differing.look_again()
    assert differing.rows() == [(1, "right")]


def test_states_of_a_peer_that_does_not_say_what_it_had_seen_are_not_merged(differing: Comparing) -> None:
    differing.hand_in(*differing.compute_states()[1:])
    differing.look_again()
    assert differing.rows() == [(1, "wrong")]


def test_what_does_not_come_in_time_ends_the_session_and_the_slice_is_compared_again(
    differing: Comparing,
) -> None:
    differing.seen = {}
    differing.hand_in(*differing.compute_states())
    differing.time_out()  # there was progress
    assert differing.verifier.counters["failed_timeout"] == 0
    differing.time_out()
    assert differing.verifier.counters["failed_timeout"] == 1
    assert differing.host.spools[0].is_closed
    differing.seen = None
    differing.look_again()
    assert differing.rows() == [(1, "wrong")], "the session is over"
    differing.go_on()
    assert differing.answer_digests().table == "a"


def test_a_peer_that_is_busy_fails_or_is_cut_off_is_left_for_another(comparing: Comparing) -> None:
    comparing.write(THEIRS, "INSERT INTO a VALUES (1, 'right')")
    comparing.damage("UPDATE a SET v = 'wrong'")
    comparing.start()
    for reason in ("busy", "link_lost", "incomplete"):
        ask = comparing.link.frames[-1]
        assert isinstance(ask, DigestAsk)
        if reason == "busy":
            comparing.hand_in(SyncBusy(ask.session))
        elif reason == "link_lost":
            comparing.link.close()
        else:
            comparing.answer_digests()
            comparing.hand_in(SyncDone(ask.session, complete=False))
        assert comparing.verifier.counters[f"failed_{reason}"] == 1
        comparing.go_on()
    assert comparing.answer_digests().table == "a"
    comparing.hand_in(*comparing.compute_states())
    assert comparing.rows() == [(1, "right")]


def test_a_link_that_takes_nothing_ends_the_session(comparing: Comparing) -> None:
    comparing.write(THEIRS, "INSERT INTO a VALUES (1, 'right')")
    comparing.damage("UPDATE a SET v = 'wrong'")
    comparing.start()
    comparing.link.is_closed = True
    comparing.hand_in(comparing.compute_ranges())
    assert comparing.verifier.counters["failed_slow"] == 1


def test_late_answers_and_those_of_others_are_not_taken(differing: Comparing) -> None:
    states = differing.compute_states()
    stranger = FakeLink(MemberInfo(WRITER, "w", "10.0.0.2", 1, 1))
    for answer in states:
        differing.verifier.handle_answer(stranger, answer)
    differing.hand_in(*(replace(answer, session=answer.session - 1) for answer in states))
    differing.verifier.handle_link_down(stranger)
    assert differing.verifier.counters["failed_link_lost"] == 0
    differing.link.close()
    assert differing.verifier.counters["failed_link_lost"] == 1
    differing.hand_in(*states)
    assert differing.rows() == [(1, "wrong")]
    assert not differing.host.calls


def test_a_table_that_the_peer_does_not_know_is_left_out(comparing: Comparing) -> None:
    comparing.stores[THEIRS].close()
    comparing.stores[THEIRS] = comparing.open(THEIRS, "CREATE TABLE b (k INTEGER PRIMARY KEY, v)")
    comparing.start()
    comparing.answer_digests()
    comparing.go_on()
    assert comparing.answer_digests().table == "b"
    comparing.go_on()
    assert comparing.verifier.passes == 1


def test_a_table_that_is_another_at_the_peer_is_left_out_of_this_pass(comparing: Comparing) -> None:
    comparing.stores[THEIRS].close()
    comparing.stores[THEIRS] = comparing.open(THEIRS, SQL.replace("v)", "v, more)"))
    comparing.stores[THEIRS].execute([("INSERT INTO a VALUES (1, 1, 'more')", ())], NOW)
    comparing.seen = comparing.stores[THEIRS].seen()
    comparing.start()
    comparing.answer_digests()
    comparing.hand_in(*comparing.compute_states())
    assert comparing.rows() == []
    comparing.go_on()
    assert comparing.answer_digests().table == "b"
    comparing.go_on()
    comparing.begin_pass()
    assert comparing.answer_digests().table == "a"


def test_a_writer_who_alone_can_tell_what_is_right_is_asked_next(comparing: Comparing) -> None:
    comparing.write(WRITER, "INSERT INTO a VALUES (1, 'right')")
    comparing.damage("UPDATE a SET v = 'wrong'")
    comparing.start()
    others = {SiteId(bytes([number]) * 16): ("10.0.0.3", number) for number in range(1, 100)}
    comparing.peers |= {**others, WRITER: ("10.0.0.2", 2)}
    comparing.answer_digests()
    comparing.hand_in(*comparing.compute_states())
    assert comparing.verifier.counters["rows_unresolved"] == 1
    assert comparing.rows() == [(1, "wrong")]
    comparing.go_on()
    assert comparing.asked == [THEIRS, WRITER]
    assert comparing.answer_digests().table == "a"
    comparing.hand_in(*comparing.compute_states())
    assert comparing.rows() == [(1, "right")]
    comparing.go_on()
    assert comparing.asked[2] in others
    assert comparing.link.frames[-1].table == "b"


def test_a_writer_who_does_not_answer_is_asked_once_for_a_slice(comparing: Comparing) -> None:
    comparing.write(WRITER, "INSERT INTO a VALUES (1, 'right')")
    comparing.damage("UPDATE a SET v = 'wrong'")
    comparing.start()
    comparing.peers[WRITER] = ("10.0.0.2", 2)
    comparing.answer_digests()
    comparing.hand_in(*comparing.compute_states())
    comparing.go_on()
    assert comparing.asked == [THEIRS, WRITER]
    comparing.link.close()
    del comparing.peers[WRITER]
    comparing.go_on()
    comparing.peers[WRITER] = ("10.0.0.2", 2)
    comparing.answer_digests()
    comparing.hand_in(*comparing.compute_states())
    comparing.peers = {THEIRS: comparing.peers[THEIRS]}
    comparing.go_on()
    assert comparing.link.frames[-1].table == "b"


def test_nobody_in_reach_is_waited_for(comparing: Comparing) -> None:
    comparing.peers = {}
    comparing.start()
    assert not comparing.asked
    comparing.peers = {THEIRS: ("10.0.0.1", 1)}
    comparing.is_reachable = False
    comparing.go_on()
    assert not comparing.link.frames
    comparing.is_reachable = True
    comparing.go_on()
    assert comparing.answer_digests().table == "a"
    assert comparing.verifier.counters["slices"] == 1


def test_a_row_that_nobody_knows_becomes_a_write_of_ours(comparing: Comparing) -> None:
    comparing.damage("INSERT INTO a VALUES (5, 'stray')")
    comparing.start()
    comparing.answer_digests()
    assert comparing.verifier.counters["strays_adopted"] == 1
    assert [item.site for commit in comparing.host.commits for item in commit.changesets] == [OURS]


def test_a_disk_that_takes_no_spool_ends_the_session(
    comparing: Comparing, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparing.write(THEIRS, "INSERT INTO a VALUES (1, 'right')")
    comparing.damage("UPDATE a SET v = 'wrong'")

    def refuse(*_: object) -> ListSpool:
        raise error

    error: Exception = OSError("disk")
    with monkeypatch.context() as patch:
        patch.setattr(comparing.host, "make_spool", refuse)
        comparing.start()
        comparing.answer_digests()
    assert comparing.verifier.counters["failed_spool"] == 1
    error = SpoolError("too much")
    with monkeypatch.context() as patch:
        patch.setattr(ListSpool, "write", refuse)
        comparing.go_on()
        comparing.answer_digests()
        comparing.hand_in(*comparing.compute_states())
    assert comparing.verifier.counters["failed_spool"] == 2
    assert comparing.host.spools[-1].is_closed
    comparing.go_on()
    comparing.answer_digests()
    comparing.hand_in(*comparing.compute_states())
    assert comparing.rows() == [(1, "right")]


def test_a_chunk_in_pieces_is_kept_as_one(differing: Comparing) -> None:
    state, chunk, done = differing.compute_states()
    assert isinstance(chunk, SnapshotChunk)
    pieces = [SnapshotChunk(chunk.session, chunk.chunk[at : at + 9], more=True) for at in range(0, 900, 9)]
    differing.hand_in(state, *pieces, SnapshotChunk(chunk.session, b""), done)
    assert differing.host.spools[0].chunks == [chunk.chunk]
    assert differing.rows() == [(1, "right")]


def test_a_chunk_that_does_not_end_is_not_kept(differing: Comparing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replication.core.pull.PAYLOAD_BYTES_MAX", 1_000)
    ask = differing.link.frames[-1]
    assert isinstance(ask, StatesAsk)
    differing.hand_in(*[SnapshotChunk(ask.session, bytes(300), more=True)] * 4)
    assert differing.verifier.counters["failed_chunk"] == 1
    assert differing.host.spools[0].is_closed


def test_sessions_are_told_from_those_that_bring_changesets(comparing: Comparing) -> None:
    comparing.start()
    assert comparing.verifier.owns(comparing.compute_ranges())
    assert not comparing.verifier.owns(SyncBusy(1))
