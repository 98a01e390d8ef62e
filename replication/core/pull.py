"""One round of a sync session, from the side that asks.

Decides what to ask a peer for and what its answers mean. Knows nothing of links, of the store or of how
long to wait. Invariant: a round ends with `Over`, with `Adopt`, or with a SyncError; after that it takes no
more answers.
"""

from collections.abc import Callable
from typing import NamedTuple

from replication.core.change import EncodedChangeset
from replication.core.clock import SiteId
from replication.core.needs import Seen, compute_missing, encode_seen, plan_needs
from replication.core.wire import (
    Frame,
    SnapshotAsk,
    SnapshotChunk,
    SyncAsk,
    SyncBusy,
    SyncChanges,
    SyncDone,
    SyncOpen,
    SyncState,
)
from replication.errors import ReplicationError

Answer = SyncState | SyncBusy | SyncChanges | SyncDone | SnapshotChunk

# Asked for at once; what is over comes in the next round.
NEEDS_MAX = 1_024
# A peer that always has more is left alone after this many rounds, until the next session.
ROUNDS_MAX = 64


class SyncError(ReplicationError):
    """A session that ended early; `reason` is fit for a metric's label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Ask(NamedTuple):
    """Send this to the peer."""

    frame: Frame


class Take(NamedTuple):
    """Apply these changesets before the next answer is handed in."""

    changesets: tuple[EncodedChangeset, ...]


class Keep(NamedTuple):
    """Keep this part of a snapshot with those before it."""

    chunk: bytes


class Adopt(NamedTuple):
    """Apply the snapshot that was kept; the round is over and there is more to ask for."""


class Over(NamedTuple):
    """The round is over."""

    more: bool  # whether anything was asked for, so that another round may find more


Step = Ask | Take | Keep | Adopt | Over


class PullRound:
    """Our side of one round."""

    def __init__(self, number: int, us: SiteId, seen: Callable[[], Seen]) -> None:
        self.number = number
        # Versions of our own site that the peer has and we do not: our database went back in time.
        self.own_versions_lost = 0
        self._us = us
        self._seen = seen
        self._asked: type[SyncOpen | SyncAsk | SnapshotAsk] = SyncOpen  # the last thing we sent

    def open(self) -> Frame:
        """Return what starts the round."""
        return SyncOpen(self.number, encode_seen(self._seen()))

    def handle_answer(self, answer: Answer) -> Step:
        """Take the peer's next answer; raises SyncError."""
        if isinstance(answer, SyncBusy):
            raise SyncError("busy")
        if self._asked is SyncOpen and isinstance(answer, SyncState):
            return self._handle_state(answer)
        if self._asked is SyncAsk and isinstance(answer, SyncChanges):
            return Take(answer.changesets)
        if self._asked is SnapshotAsk and isinstance(answer, SnapshotChunk):
            return Keep(answer.chunk)
        if self._asked is not SyncOpen and isinstance(answer, SyncDone):
            if not answer.complete:
                raise SyncError("incomplete")
            return Adopt() if self._asked is SnapshotAsk else Over(more=True)
        raise SyncError("unexpected")

    def _handle_state(self, state: SyncState) -> Step:
        seen = self._seen()
        lost = compute_missing(seen, state.seen).get(self._us, [])
        # They are fetched like any others; the count stays, for somebody to ask how that could happen.
        self.own_versions_lost = sum(last - first + 1 for first, last in lost)
        plan = plan_needs(seen, state.seen, state.floors, needs_max=NEEDS_MAX)
        if plan.snapshot:
            self._asked = SnapshotAsk
            return Ask(SnapshotAsk(self.number))
        if not plan.needs:
            return Over(more=False)
        self._asked = SyncAsk
        return Ask(SyncAsk(self.number, plan.needs))
