"""One round of a sync session, from the side that asks.

Decides what to ask a peer for and what its answers mean. Knows nothing of links, of the store or of how
long to wait. Invariant: a round ends with `Over`, with `Adopt`, or with a SyncError; after that it takes no
more answers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from replication.core.change import PAYLOAD_BYTES_MAX, EncodedChangeset
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
    SyncPart,
    SyncState,
)
from replication.errors import ReplicationError

Answer = SyncState | SyncBusy | SyncChanges | SyncPart | SyncDone | SnapshotChunk

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


class Wait(NamedTuple):
    """There is nothing to do until the next answer."""


class Keep(NamedTuple):
    """Keep this chunk of a snapshot with those before it."""

    chunk: bytes


class Adopt(NamedTuple):
    """Apply the snapshot that was kept; the round is over and there is more to ask for."""


class Over(NamedTuple):
    """The round is over."""

    more: bool  # whether anything was asked for, so that another round may find more


Step = Ask | Take | Wait | Keep | Adopt | Over


@dataclass(slots=True)
class Partial:
    """What has come so far of a payload that travels in parts; any peer can send the rest."""

    site: SiteId
    version: int
    data: bytearray = field(default_factory=bytearray)


class Pieces:
    """Of a chunk that takes several frames, those that have come."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def add(self, frame: SnapshotChunk) -> bytes | None:
        """Return the chunk when this makes it whole; raises SyncError when it does not end."""
        if not frame.chunk and not self._pieces:
            return None  # the peer is still reading
        self._pieces.append(frame.chunk)
        if sum(map(len, self._pieces)) > PAYLOAD_BYTES_MAX:
            raise SyncError("chunk")
        if frame.more:
            return None
        whole = b"".join(self._pieces)
        self._pieces.clear()
        return whole


class PullRound:
    """Our side of one round."""

    def __init__(
        self, number: int, us: SiteId, seen: Callable[[], Seen], partial: Partial | None = None
    ) -> None:
        self.number = number
        self.partial = partial  # set with the first part of a payload, cleared with its last
        # Versions of our own site that the peer has and we do not: our database went back in time.
        self.own_versions_lost = 0
        self._us = us
        self._seen = seen
        self._asked: type[SyncOpen | SyncAsk | SnapshotAsk] = SyncOpen  # the last thing we sent
        self._pieces = Pieces()

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
        if self._asked is SyncAsk and isinstance(answer, SyncPart):
            return self._handle_part(answer)
        if self._asked is SnapshotAsk and isinstance(answer, SnapshotChunk):
            return self._handle_chunk(answer)
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
        needs = list(plan.needs)
        offset = 0
        if self.partial is not None:
            site, version = self.partial.site, self.partial.version
            if any(who == site and first <= version <= last for who, first, last in needs):
                needs.insert(0, (site, version, version))
                offset = len(self.partial.data)
            else:
                self.partial = None
        return Ask(SyncAsk(self.number, tuple(needs), offset))

    def _handle_part(self, part: SyncPart) -> Step:
        partial = self.partial
        if partial is None or (partial.site, partial.version) != (part.site, part.version):
            partial = self.partial = Partial(part.site, part.version)
        if part.offset != len(partial.data) or part.total_bytes > PAYLOAD_BYTES_MAX:
            self.partial = None
            raise SyncError("part")
        partial.data += part.data
        if len(partial.data) < part.total_bytes:
            return Wait()
        self.partial = None
        return Take((EncodedChangeset(part.site, part.version, bytes(partial.data)),))

    def _handle_chunk(self, chunk: SnapshotChunk) -> Step:
        whole = self._pieces.add(chunk)
        return Wait() if whole is None else Keep(whole)
