"""How old our view of each site is, and up to which time everything has reached everybody.

Each site says now and then how far it has written and what it has of the others; these heartbeats go along
the broadcast tree, and when a sync begins we ask for those that are overdue. Decides what they prove. Knows
nothing of links, stores or membership: who counts is told by `set_roll`. Invariant: when
`compute_stable_hlc` returns S, every member of the roll has all that members of the roll wrote up to S, and
we have all that any of them wrote before it had that; of sites that are gone all have seen the same.

The second half is what makes it safe to forget a deletion: an update of the deleted row by somebody who did
not know of the deletion is one that we have seen.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from replication.core.clock import HLC_MAX, MAX_DRIFT_MS, NEVER, Hlc, SiteId, compute_ms
from replication.core.needs import Seen, get_head
from replication.core.probe import Rng, jitter, pick
from replication.core.wire import Beats, Heartbeat

# Frames of about 50 kB, so that a probe does not wait behind one.
_BEATS_PER_FRAME = 1_024
# While we lag behind a site its beats wait for us: the oldest, as we reach that first, and the newest.
_PENDING_MAX = 4
# While nothing has been pushed, any link may be part of the tree: by so many of them chosen at random a beat
# reaches all but e^-4, and others the next time. Along all 24 of a node it would come 24 times.
_UNTRIED_MAX = 4
# A site is overdue after so many intervals: jitter takes a quarter, the way along the tree another.
_OVERDUE_INTERVALS = 1.5
# Asked for in one sync, at random: with half of a large cluster gone, the question is still a small frame.
_ASKED_MAX = 128


@dataclass(frozen=True, slots=True)
class FreshnessSettings:
    """The knobs; at any size of a cluster a node takes in about fifty beats a second."""

    beat_interval_ms: float = 1_000
    beat_interval_per_member_ms: float = 20
    # Batches what is passed on; a path of eight links takes about a second, or a fifth of the interval.
    flush_ms: float = 150
    flush_per_interval: float = 1 / 40
    sites_max: int = 4_096  # bounds what a liar can make us remember
    ahead_max_ms: int = MAX_DRIFT_MS  # a beat from further in the future would silence those that are right


class SendFrame(NamedTuple):
    """Send beats on the stream to a peer; they may get lost with the link."""

    peer: SiteId
    message: Beats


class BeatDue(NamedTuple):
    """Ask the store, at one moment, for our last version and a time after which all later ones will be.

    Hand them to `handle_own`, with this. The time must outlive a crash: no later write has an earlier one.
    """

    complete_hlc: Hlc
    roll: int


Output = SendFrame | BeatDue


@dataclass(slots=True)
class _Origin:
    """What a site said of itself."""

    newest: Heartbeat
    taken_ms: float  # when that came
    covered: Heartbeat | None = None  # the newest of which we have all versions
    pending: list[Heartbeat] = field(default_factory=list)  # later than that, oldest first

    def cover(self, head: int) -> None:
        """Take note that we have all versions up to head."""
        for index, beat in reversed(list(enumerate(self.pending))):
            if beat.version <= head:
                self.covered = beat
                del self.pending[: index + 1]
                return


class Freshness:
    """One node's part in the heartbeats."""

    def __init__(
        self, me: SiteId, settings: FreshnessSettings, rng: Rng, *, seen: Callable[[], Seen]
    ) -> None:
        self.counters: Counter[str] = Counter()
        # The largest time that peers know of us: after a crash or a restore our clock has to observe it.
        self.own_hlc_floor = NEVER
        self._me = me
        self._settings = settings
        self._rng = rng
        self._seen = seen
        self._own: Heartbeat | None = None  # our last beat
        self._origins: dict[SiteId, _Origin] = {}
        self._ahead_ms: dict[SiteId, int] = {}  # of the roll and of origins: its last beat, when that came
        self._news: dict[SiteId, SiteId | None] = {}  # whose beats are to be passed on, and who sent them
        self._beat_at = math.inf  # set by `start`
        self._flush_at = math.inf  # set while there is news
        self._started_ms = math.inf
        self._roll: tuple[SiteId, ...] = ()

    # --- inputs ---------------------------------------------------------------------------------------

    def start(self, now_ms: float) -> None:
        """Begin to beat; nodes that start together drift apart."""
        self._started_ms = now_ms
        self._beat_at = now_ms + self._settings.beat_interval_ms * self._rng.random()

    def set_roll(self, sites: Iterable[SiteId]) -> None:
        """Say who counts beside us: whoever may yet write something, or must get what is written."""
        self._roll = tuple(sorted({*sites} - {self._me}))
        for gone in self._ahead_ms.keys() - {*self._roll, *self._origins}:
            del self._ahead_ms[gone]

    def _compute_interval_ms(self) -> float:
        settings = self._settings
        return max(settings.beat_interval_ms, settings.beat_interval_per_member_ms * (len(self._roll) + 1))

    def _compute_roll(self) -> int:
        """Return a digest of who is on the roll, and of what we have seen of sites that are not.

        Nobody beats for those any more; what they wrote has reached everybody when all have seen the same.
        """
        everybody = {*self._roll, self._me}
        digest = blake2b(b"".join(sorted(everybody)), digest_size=4)
        seen = self._seen()
        for site in sorted(seen.keys() - everybody):
            digest.update(site + repr(seen[site].encode()).encode())
        return int.from_bytes(digest.digest())

    def _head(self, site: SiteId) -> int:
        return get_head(self._seen(), site)

    def next_at(self) -> float:
        """Return when `tick` is due."""
        return min(self._beat_at, self._flush_at)

    def tick(
        self, now_ms: float, eager: Collection[SiteId], untried: Collection[SiteId] = ()
    ) -> list[Output]:
        """Do what is due; news goes to the eager peers, and of those that are untried only to some."""
        out: list[Output] = []
        if self._beat_at <= now_ms:
            self._beat_at = now_ms + jitter(self._rng, self._compute_interval_ms())
            # Before the store is asked: what we write until it answers is in the version that it names.
            out.append(BeatDue(self._compute_complete(), self._compute_roll()))
        if self._flush_at <= now_ms:
            self._flush_at = math.inf
            news, self._news = self._news, {}
            tried = [site for site in eager if site not in untried]
            for peer in [*tried, *pick(self._rng, list(untried), _UNTRIED_MAX)]:
                beats = [
                    beat
                    for site, source in news.items()
                    if peer not in (site, source) and (beat := self._find_newest(site)) is not None
                ]
                out += [SendFrame(peer, message) for message in _pack(beats)]
        return out

    def handle_own(self, due: BeatDue, version: int, hlc: Hlc, now_ms: float) -> None:
        """Take what the store said when a beat was due."""
        if self._own is not None and hlc <= self._own.hlc:
            self.counters["own_clock_back"] += 1
            return
        self._own = Heartbeat(self._me, version, hlc, min(due.complete_hlc, hlc), due.roll)
        self._tell(self._me, None, now_ms)

    def handle_beats(
        self, peer: SiteId, beats: Iterable[Heartbeat], now_ms: float, wall_ms: int
    ) -> list[Beats]:
        """Take beats that a peer passed on; return what to tell it, as it is behind with some."""
        interval_ms = self._compute_interval_ms()
        newer = []
        for beat in beats:
            if compute_ms(beat.hlc) > wall_ms + self._settings.ahead_max_ms:
                self.counters["beats_ahead"] += 1
                if beat.site in self._roll:
                    self._ahead_ms[beat.site] = compute_ms(beat.hlc) - wall_ms
                continue
            if beat.site == self._me:
                self.own_hlc_floor = max(self.own_hlc_floor, beat.hlc)
            newest = self._find_newest(beat.site)
            if newest is None or newest.hlc < beat.hlc:
                if beat.site != self._me and beat.hlc != NEVER and self._keep(beat, now_ms):
                    self._ahead_ms[beat.site] = compute_ms(beat.hlc) - wall_ms
                    self._tell(beat.site, peer, now_ms)
                continue
            self.counters["beats_old"] += 1
            # One that is late along the tree is not a whole interval late; one that does not know how far its
            # own clock was has been restored.
            behind_ms = compute_ms(newest.hlc) - compute_ms(beat.hlc)
            if newest.hlc > beat.hlc and (beat.site == peer or behind_ms >= interval_ms):
                newer.append(newest)
        return _pack(newer)

    def handle_seen(self, site: SiteId) -> None:
        """Take note that the site's head moved."""
        origin = self._origins.get(site)
        if origin is not None and origin.pending:
            origin.cover(self._head(site))

    # --- what is known --------------------------------------------------------------------------------

    def export(self, now_ms: float) -> list[Beats]:
        """Return what to say when a sync begins: our beat, and the last one of those that are overdue.

        With an old beat, or one of no time, we ask: a peer that has a newer one answers with it.
        """
        overdue: list[Heartbeat] = []
        late_ms = now_ms - _OVERDUE_INTERVALS * self._compute_interval_ms()
        if self._started_ms <= late_ms:
            for site in self._roll:
                origin = self._origins.get(site)
                if origin is None or origin.taken_ms <= late_ms:
                    overdue.append(origin.newest if origin is not None else _ask(site))
        own = self._own if self._own is not None else _ask(self._me)
        return _pack([own, *pick(self._rng, overdue, _ASKED_MAX)])

    def compute_staleness_ms(self, site: SiteId, wall_ms: int) -> int | None:
        """Return how long ago we had all that the site had written; None when it never said."""
        if site == self._me:
            return 0
        origin = self._origins.get(site)
        if origin is None or origin.covered is None:
            return None
        return max(0, wall_ms - compute_ms(origin.covered.hlc))

    def compute_ahead_ms(self, site: SiteId) -> int | None:
        """Return by how much the clock of a site was ahead of ours at its last beat, None when it never said.

        Below zero it says little: that is also how long the beat took. And a clock that is ahead takes along
        those that hear of it: of several sites the one that is ahead most is to blame.
        """
        return self._ahead_ms.get(site)

    def find_complete(self, sites: Iterable[SiteId], hlc: Hlc) -> list[SiteId]:
        """Return those that say that they have all that the roll wrote up to a time.

        One that counts others than we do may say so without having looked for what we wrote.
        """
        if hlc == NEVER:
            return list(sites)
        roll = self._compute_roll()
        beats = ((site, origin.newest) for site in sites if (origin := self._origins.get(site)) is not None)
        return [site for site, beat in beats if beat.roll == roll and beat.complete_hlc >= hlc]

    def compute_stable_hlc(self) -> Hlc:
        """Return up to which time everything has reached everybody on the roll; NEVER while it is not known.

        It is not known while members disagree about who is on the roll, which is while one comes or goes, or
        while something of a site that is gone still spreads.
        """
        if self._own is None:
            return NEVER
        stable = self._own.hlc
        roll = self._compute_roll()
        for site in self._roll:
            origin = self._origins.get(site)
            # Not of its newest beat: what it wrote before that one may still be on its way to us.
            beat = origin.covered if origin is not None else None
            if beat is None or beat.roll != roll:
                return NEVER
            stable = min(stable, beat.hlc, beat.complete_hlc)
        return stable

    def measure(self) -> dict[str, tuple[int, int]]:
        """Return what each memory holds, and the most that it may hold."""
        return {"beats": (len(self._origins), self._settings.sites_max)}

    def _compute_complete(self) -> Hlc:
        """Return up to which time we have all that the others wrote."""
        complete = Hlc(HLC_MAX)
        for site in self._roll:
            origin = self._origins.get(site)
            complete = min(complete, origin.covered.hlc if origin and origin.covered else NEVER)
        return complete

    # --- keeping and passing on -----------------------------------------------------------------------

    def _keep(self, beat: Heartbeat, now_ms: float) -> bool:
        origin = self._origins.get(beat.site)
        if origin is None:
            if len(self._origins) >= self._settings.sites_max and not self._forget_one():
                self.counters["beats_refused"] += 1
                return False
            origin = self._origins[beat.site] = _Origin(beat, now_ms)
        self.counters["beats_new"] += 1
        origin.newest = beat
        origin.taken_ms = now_ms
        del origin.pending[_PENDING_MAX - 1 :]
        origin.pending.append(beat)
        origin.cover(self._head(beat.site))
        return True

    def _forget_one(self) -> bool:
        roll = {*self._roll}
        strangers = [origin.newest for site, origin in self._origins.items() if site not in roll]
        if not strangers:
            return False
        forgotten = min(strangers, key=lambda beat: beat.hlc).site
        del self._origins[forgotten]
        self._ahead_ms.pop(forgotten, None)
        self._news.pop(forgotten, None)
        return True

    def _tell(self, site: SiteId, source: SiteId | None, now_ms: float) -> None:
        self._news[site] = source
        settings = self._settings
        flush_ms = max(settings.flush_ms, settings.flush_per_interval * self._compute_interval_ms())
        self._flush_at = min(self._flush_at, now_ms + flush_ms)

    def _find_newest(self, site: SiteId) -> Heartbeat | None:
        if site == self._me:
            return self._own
        origin = self._origins.get(site)
        return origin.newest if origin is not None else None


def _ask(site: SiteId) -> Heartbeat:
    """Return the beat that says nothing, which any other is newer than."""
    return Heartbeat(site, 0, NEVER, NEVER, 0)


def _pack(beats: list[Heartbeat]) -> list[Beats]:
    return [
        Beats(tuple(beats[start : start + _BEATS_PER_FRAME]))
        for start in range(0, len(beats), _BEATS_PER_FRAME)
    ]
