"""Sync sessions from the side that asks.

Moves what `core.pull` asks for; `core.sync` decides when. Knows nothing of what a changeset holds. Invariant:
one session at a time, so that nothing is asked for twice; while one answer is being applied at most a few
more are in memory, as the link is paused then.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from replication.core.change import EncodedChangeset
from replication.core.clock import SiteId
from replication.core.links import Link
from replication.core.needs import Seen
from replication.core.pull import (
    ROUNDS_MAX,
    Adopt,
    Answer,
    Ask,
    Keep,
    Over,
    Partial,
    PullRound,
    SyncError,
    Take,
    Wait,
)
from replication.core.wire import Members, SnapshotAsk, encode
from replication.errors import ReplicationError
from replication.host import Host, Spool

# Answers that may wait while one is applied: enough that the peer need not wait for each.
WAITING_MAX = 2

# Sessions that compare tables have numbers from here on; see `verifier`.
NUMBER_END = 2**31

Failed = Callable[[Exception], None]


@dataclass(slots=True)
class _Session:
    """Our side of one exchange with a peer."""

    peer: SiteId
    link: Link
    borrowed: bool  # whether the link was dialled for this
    round: PullRound
    rounds: int = 1
    received: int = 0
    came: int = 0  # in this round
    moved: int = 0  # answers taken, so that a timeout can tell whether there was progress
    busy: bool = False  # while an answer is applied
    waiting: deque[Answer] = field(default_factory=deque)
    spool: Spool | None = None  # while a snapshot comes in


class Puller:
    """One replica's own sessions."""

    def __init__(
        self,
        host: Host,
        us: SiteId,
        counters: Counter[str],
        *,
        seen: Callable[[], Seen],
        apply: Callable[[Sequence[EncodedChangeset], Callable[[int], None], Failed], None],
        adopt: Callable[[Spool, Callable[[], None], Failed], None],
        members: Callable[[], Members],
        on_over: Callable[[SiteId, int, Exception | None], None],
        timeout_ms: float,
    ) -> None:
        # Versions of our own site that a peer has and we do not: this database went back in time.
        self.own_versions_lost = 0
        self._host = host
        self._us = us
        self._counters = counters
        self._seen = seen
        self._apply = apply
        self._adopt = adopt
        self._members = members
        self._on_over = on_over
        self._timeout_ms = timeout_ms
        self._session: _Session | None = None
        self._number = 0
        self._partial: Partial | None = None  # of a payload whose session ended before it was whole

    def begin(self, peer: SiteId, link: Link, *, borrowed: bool) -> None:
        """Bring over what the peer has and we lack; `on_over` is told when that has ended, and how."""
        assert self._session is None, "one session at a time"
        self._session = session = _Session(peer, link, borrowed, self._make_round())
        self._begin_round(session)

    def handle_answer(self, link: Link, answer: Answer) -> None:
        """Take an answer of the peer."""
        session = self._session
        if session is None or session.link is not link or session.round.number != answer.session:
            self._counters["answers_late"] += 1
            return
        session.waiting.append(answer)
        if session.busy and len(session.waiting) >= WAITING_MAX:
            link.pause()
        self._advance(session)

    def handle_link_down(self, link: Link) -> None:
        """End our session if it was on this link."""
        session = self._session
        if session is not None and session.link is link:
            self._finish(session, SyncError("link_lost"))

    def _make_round(self) -> PullRound:
        self._number = (self._number + 1) % NUMBER_END
        partial, self._partial = self._partial, None
        return PullRound(self._number, self._us, self._seen, partial)

    def _begin_round(self, session: _Session) -> None:
        self._counters["sessions"] += 1
        session.came = 0
        session.link.send(encode(self._members()))
        if session.link.send(encode(session.round.open())):
            self._watch(session)
        else:
            self._finish(session, SyncError("slow"))

    def _watch(self, session: _Session) -> None:
        moved, round_ = session.moved, session.round

        def check() -> None:
            if self._session is not session or session.round is not round_:
                return
            if session.moved != moved or session.busy:
                self._watch(session)
                return
            # What the peer still sends would be taken for the answer to something else.
            self._finish(session, SyncError("timeout"))
            session.link.close()

        self._host.call_later(self._timeout_ms, check)

    def _advance(self, session: _Session) -> None:
        """Take what waits, one answer after another."""
        while session.waiting and not session.busy and self._session is session:
            answer = session.waiting.popleft()
            session.link.resume()
            session.moved += 1
            try:
                self._take(session, answer)
            except (ReplicationError, OSError) as error:
                self._finish(session, error)

    def _take(self, session: _Session, answer: Answer) -> None:
        match session.round.handle_answer(answer):
            case Ask(frame):
                self.own_versions_lost += session.round.own_versions_lost
                if isinstance(frame, SnapshotAsk):
                    session.spool = self._host.make_spool()
                if not session.link.send(encode(frame)):
                    raise SyncError("slow")
            case Take(changesets):
                session.busy = True
                self._counters["changesets_received"] += len(changesets)
                self._apply(
                    changesets,
                    lambda count: self._go_on(session, count),
                    lambda error: self._finish(session, error),
                )
            case Wait():
                pass
            case Keep(chunk):
                assert session.spool is not None, "a snapshot was asked for"
                session.spool.write(chunk)
            case Adopt():
                assert session.spool is not None, "a snapshot was asked for"
                session.busy = True
                self._adopt(
                    session.spool,
                    lambda: self._adopted(session),
                    lambda error: self._finish(session, error),
                )
            case Over(more):
                self._end_round(session, more=more)

    def _go_on(self, session: _Session, count: int) -> None:
        if self._session is session:
            session.busy = False
            session.came += count
            self._advance(session)

    def _adopted(self, session: _Session) -> None:
        if self._session is session:
            self._counters["snapshots_received"] += 1
            session.busy = False
            session.came = 1
            self._drop_spool(session)
            self._end_round(session, more=True)

    def _end_round(self, session: _Session, *, more: bool) -> None:
        session.received += session.came
        if session.came and more and session.rounds < ROUNDS_MAX:
            session.rounds += 1
            session.round = self._make_round()
            self._begin_round(session)
        else:
            self._finish(session, None)

    def _finish(self, session: _Session, error: Exception | None) -> None:
        if self._session is not session:
            return
        self._session = None
        self._partial = session.round.partial
        self._drop_spool(session)
        session.waiting.clear()
        session.link.resume()
        if session.borrowed:
            session.link.retire()
        if error is not None:
            self._counters[f"failed_{getattr(error, 'reason', type(error).__name__)}"] += 1
        self._on_over(session.peer, session.received, error)

    def _drop_spool(self, session: _Session) -> None:
        if session.spool is not None:
            session.spool.close()
            session.spool = None
