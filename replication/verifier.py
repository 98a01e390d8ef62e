"""When to compare tables with a peer, and the sessions in which that is done.

Goes through all tables a slice at a time, each with another peer, and heals what differs; what two rows are
to be is decided in `verifying`. Knows nothing of SQL. Invariants: what a peer has is merged only when we have
seen all that it had seen, or a part of a transaction would show; and none of a peer that lacks a deletion
which we have forgotten, or it would bring the row back.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from replication.core.change import Commit, some
from replication.core.clock import SiteId
from replication.core.links import Link
from replication.core.member import Address
from replication.core.needs import Seen, WireSeen, is_ahead
from replication.core.probe import Rng, jitter, pick
from replication.core.pull import Pieces, SyncError
from replication.core.wire import (
    DigestAsk,
    DigestRanges,
    Frame,
    SnapshotChunk,
    StatesAsk,
    SyncBusy,
    SyncDone,
    SyncState,
    encode,
)
from replication.errors import SnapshotError, StoreError
from replication.host import Host, Spool, SpoolError
from replication.pulls import NUMBER_END
from replication.store import Store
from replication.verifying import Bounds, Healed, adopt_strays, find_differences, heal

Answer = DigestRanges | SyncState | SnapshotChunk | SyncDone | SyncBusy
# How often to look whether what the peer had seen has come.
WAIT_MS = 100.0
# Our own rows within the peer's slice, in slices, beyond which it is cut: a new peer's is the whole table.
SLICES_OURS = 4
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class VerifySettings:
    """The knobs; reading a row's digest takes about 5 µs, here and at the peer."""

    slice_rows: int = 4_096  # 20 ms of the store's time, in which nobody else writes
    pause_ms: float = 2_000  # between slices: a million rows take eight minutes, and one percent of a core
    interval_ms: float = 60_000  # from the end of a pass to the next one
    timeout_ms: float = 10_000


@dataclass(slots=True)
class _Session:
    """One slice of one table, compared with one peer."""

    number: int
    peer: SiteId
    link: Link
    borrowed: bool
    table: str
    after: bytes | None
    upper: bytes | None = None  # set with the peer's digests: the end of the slice, None at the table's end
    differing: list[Bounds] = field(default_factory=list)  # still to be asked for
    # Of the range that was asked for last: what the peer had seen when it read it, and its chunks.
    seen: WireSeen | None = None
    spool: Spool | None = None
    pieces: Pieces = field(default_factory=Pieces)
    moved: int = 0  # answers and settled ranges, so that a timeout can tell whether there was progress


class Verifier:
    """One replica's comparisons, asking and healing."""

    def __init__(
        self,
        host: Host,
        settings: VerifySettings,
        rng: Rng,
        *,
        peers: Callable[[], dict[SiteId, Address]],
        borrow: Callable[[SiteId, Address, Callable[[Link | None, bool], None]], None],
        seen: Callable[[], Seen],
        is_gone: Callable[[SiteId], bool],
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.passes = 0  # through all tables
        self._host = host
        self._settings = settings
        self._rng = rng
        self._peers = peers
        self._borrow = borrow
        self._seen = seen
        self._is_gone = is_gone
        self._session: _Session | None = None
        self._number = NUMBER_END
        self._tables: list[str] = []  # still to go through in this pass
        self._after: bytes | None = None  # up to where the first of them is done
        # Of this slice: writers of values that only they can tell, and those of them who were asked.
        self._wanted: dict[SiteId, None] = {}
        self._asked: set[SiteId] = set()

    def start(self) -> None:
        """Begin the first pass, some time from now."""
        self._host.call_later(jitter(self._rng, self._settings.pause_ms), self._begin_pass)

    def owns(self, answer: Answer) -> bool:
        """Return whether an answer is for a session of ours, not for one that brings changesets."""
        return answer.session >= NUMBER_END

    # --- a pass ---------------------------------------------------------------------------------------

    def _begin_pass(self) -> None:
        def begin(tables: list[str]) -> None:
            self._tables = tables
            self._after = None
            self._begin()

        self._host.run(lambda store: list(store.tables), begin, lambda _: self._wait(self._begin_pass))

    def _wait(self, act: Callable[[], None], wait_ms: float | None = None) -> None:
        self._host.call_later(jitter(self._rng, wait_ms or self._settings.pause_ms), act)

    def _begin(self) -> None:
        """Compare the next slice."""
        if not self._tables:
            self.passes += 1
            self._wait(self._begin_pass, self._settings.interval_ms)
            return
        peers = self._peers()
        wanted = next((site for site in self._wanted if site in peers), None)
        if wanted is not None:
            del self._wanted[wanted]
            self._asked.add(wanted)
        peer = wanted or next(iter(pick(self._rng, list(peers), 1)), None)
        if peer is None:
            self._wait(self._begin)
            return

        def borrowed(link: Link | None, is_ours: bool) -> None:
            if link is None:
                self._wait(self._begin)
                return
            self._number = NUMBER_END + (self._number + 1) % NUMBER_END
            session = _Session(self._number, peer, link, is_ours, self._tables[0], self._after)
            self._session = session
            self.counters["slices"] += 1
            self._watch(session)
            rows_max = self._settings.slice_rows
            self._send(session, DigestAsk(session.number, session.table, session.after, rows_max))

        self._borrow(peer, peers[peer], borrowed)

    # --- a session ------------------------------------------------------------------------------------

    def handle_answer(self, link: Link, answer: Answer) -> None:
        """Take an answer of the peer."""
        session = self._session
        if session is None or session.link is not link or session.number != answer.session:
            return
        session.moved += 1
        match answer:
            case DigestRanges():
                self._compare(session, answer)
            case SyncState():
                session.seen = answer.seen
            case SnapshotChunk():
                self._keep(session, answer)
            case SyncDone() if session.spool is not None and answer.complete:
                self._heal(session, session.spool)
            case SyncDone():
                self._finish(session, "incomplete")
            case SyncBusy():
                self._finish(session, "busy")

    def handle_link_down(self, link: Link) -> None:
        """End our session if it was on this link."""
        session = self._session
        if session is not None and session.link is link:
            self._finish(session, "link_lost")

    def _compare(self, session: _Session, answer: DigestRanges) -> None:
        if not answer.ranges and not answer.is_last:
            # The peer does not know the table: nothing can be said of it.
            self._skip_table(session)
            return

        def compared(found: tuple[list[Bounds], bytes | None]) -> None:
            session.differing, session.upper = found
            self.counters["ranges_differing"] += len(session.differing)
            self._advance(session)

        self._run(
            session,
            partial(
                find_differences,
                table=session.table,
                after=session.after,
                ranges=answer.ranges,
                is_last=answer.is_last,
                rows_max=SLICES_OURS * self._settings.slice_rows,
            ),
            compared,
        )

    def _advance(self, session: _Session) -> None:
        """Ask for the next range that differs, or end the slice."""
        if not session.differing:
            self._adopt_strays(session)
            return
        try:
            session.spool = self._host.make_spool()
        except OSError:
            self._finish(session, "spool")
            return
        lower, upper = session.differing.pop(0)
        self._send(session, StatesAsk(session.number, session.table, lower, upper))

    def _keep(self, session: _Session, answer: SnapshotChunk) -> None:
        if session.spool is None:
            return
        try:
            chunk = session.pieces.add(answer)
            if chunk is not None:
                session.spool.write(chunk)
        except SyncError as error:
            self._finish(session, error.reason)
        except (SpoolError, OSError):
            self._finish(session, "spool")

    def _heal(self, session: _Session, spool: Spool) -> None:
        """Merge what the peer has in a range, as soon as we have seen all that it had seen."""
        if self._session is not session:
            return  # it took too long
        if session.seen is None or is_ahead(self._seen(), session.seen):
            # What it has and we have not is on its way; a part of it must not show before the rest.
            self._host.call_later(WAIT_MS, lambda: self._heal(session, spool))
            return

        def act(store: Store) -> Healed:
            return heal(store, spool.read(), self._host.wall_ms(), session.peer, self._is_gone)

        def healed(found: Healed) -> None:
            session.moved += 1
            self._drop_spool(session)
            self.counters["rows_healed"] += found.rows
            self.counters["rows_unresolved"] += found.unresolved.total()
            self._wanted.update((writer, None) for writer in found.unresolved if writer not in self._asked)
            self._advance(session)

        self._commit(session, act, lambda found: found.commits, healed)

    def _adopt_strays(self, session: _Session) -> None:
        def act(store: Store) -> Commit | None:
            wall_ms = self._host.wall_ms()
            return adopt_strays(store, session.table, session.after, session.upper, wall_ms)

        self._commit(session, act, some, lambda commit: self._end_slice(session, strays=commit is not None))

    def _drop_spool(self, session: _Session) -> None:
        if session.spool is not None:
            session.spool.close()
            session.spool = None

    def _end_slice(self, session: _Session, *, strays: bool) -> None:
        self.counters["strays_adopted"] += strays
        if not self._wanted.keys().isdisjoint(self._peers()):
            self._finish(session, None)  # the same slice again, with the writer
        elif session.upper is None:
            self._skip_table(session)
        else:
            self._leave_slice(session, session.upper)

    def _skip_table(self, session: _Session) -> None:
        self._tables.pop(0)
        self._leave_slice(session, None)

    def _leave_slice(self, session: _Session, after: bytes | None) -> None:
        self._after = after
        self._wanted.clear()
        self._asked.clear()
        self._finish(session, None)

    def _finish(self, session: _Session, reason: str | None) -> None:
        if self._session is not session:
            return
        self._session = None
        self._drop_spool(session)
        if session.borrowed:
            session.link.retire()
        if reason is not None:
            self.counters[f"failed_{reason}"] += 1
        self._wait(self._begin)

    # --- one step -------------------------------------------------------------------------------------

    def _run(self, session: _Session, act: Callable[[Store], T], done: Callable[[T], None]) -> None:
        self._commit(session, act, lambda _: (), done)

    def _commit(
        self,
        session: _Session,
        act: Callable[[Store], T],
        commits_of: Callable[[T], Sequence[Commit]],
        done: Callable[[T], None],
    ) -> None:
        def go_on(result: T) -> None:
            if self._session is session:
                done(result)

        def failed(error: Exception) -> None:
            if isinstance(error, SnapshotError):
                # It has another schema for now; this table is looked at again in the next pass.
                self._skip_table(session)
            else:
                self._finish(session, "store" if isinstance(error, StoreError) else type(error).__name__)

        self._host.commit(act, commits_of, go_on, failed)

    def _send(self, session: _Session, frame: Frame) -> None:
        if not session.link.send(encode(frame)):
            self._finish(session, "slow")

    def _watch(self, session: _Session) -> None:
        moved = session.moved

        def check() -> None:
            if self._session is not session:
                return
            if session.moved != moved:
                self._watch(session)
            else:
                self._finish(session, "timeout")

        self._host.call_later(self._settings.timeout_ms, check)
