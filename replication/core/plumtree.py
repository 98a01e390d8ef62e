"""How a new changeset reaches every node: eagerly along a tree, by name along all other links.

Decides which link is part of the tree, and asks for what was announced but did not come. Knows nothing
of sockets, of what a changeset holds, or of whether it was applied: that it learns from `has`.
Invariant: a changeset is delivered and passed on once for as long as it is remembered or `has` knows it.

After Leitão, Pereira, Rodrigues 2007. Departures: there is one tree for all sources; a duplicate prunes
only if the first copy was pushed too, so that a sync which was faster does not take the tree apart;
and when nobody can send an announced changeset, the answer is a sync.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from replication.core.change import PUSH_BYTES_MAX, EncodedChangeset
from replication.core.clock import SiteId
from replication.core.limits import OriginLimits, OriginSettings
from replication.core.timers import Timers
from replication.core.wire import ITEMS_MAX, ChangesetId, Frame, Graft, IHave, Large, Prune, Push


@dataclass(frozen=True, slots=True)
class PlumtreeSettings:
    """The knobs, with what each costs."""

    announce_interval_ms: float = 20  # batches IHave; adds to the time that a graft takes
    # At most; with all round trips known it is shorter. Longer than a path along the tree, or grafts win.
    graft_timeout_ms: float = 300
    announced_max: int = 4_096  # per peer; what does not fit is found by the next sync
    missing_max: int = 16_384
    recent_max: int = 65_536  # about a minute of a busy cluster
    push_bytes_max: int = PUSH_BYTES_MAX  # what is larger is named, and pulled by those who lack it
    cache_bytes_max: int = 16 * 1024 * 1024  # what can be resent without reading the log


# How many announcers of one changeset are remembered; each is worth one more attempt before a sync.
_ANNOUNCERS_MAX = 4
# Within one region the tree takes a few milliseconds; the rest is for a busy event loop.
_GRAFT_TIMEOUT_MIN_MS = 50.0


# --- outputs ------------------------------------------------------------------------------------------


class SendFrame(NamedTuple):
    """Send a message on the stream to a peer; it may get lost with the link."""

    peer: SiteId
    message: Frame


class Deliver(NamedTuple):
    """A changeset that is new here."""

    changeset: EncodedChangeset


class Resend(NamedTuple):
    """Push to a peer what is no longer cached: read it from the log."""

    peer: SiteId
    id: ChangesetId


class NeedSync(NamedTuple):
    """A changeset was announced and did not come: sync with the one who announced it."""

    peer: SiteId


Output = SendFrame | Deliver | Resend | NeedSync


class _Announce(NamedTuple):
    pass


class _GraftDue(NamedTuple):
    id: ChangesetId


@dataclass(slots=True)
class _Peer:
    eager: bool = True  # every link starts in the tree; duplicates take it out
    tried: bool = False  # set by the first push along it, in either direction


@dataclass(slots=True)
class _Missing:
    announcers: list[SiteId]  # not yet asked
    asked: SiteId | None = None  # the last to whom a Graft went


class Plumtree:
    """One node's part in the broadcast."""

    def __init__(
        self,
        settings: PlumtreeSettings,
        *,
        has: Callable[[SiteId, int], bool],
        distance: Callable[[SiteId], float],
        origins: OriginLimits | None = None,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._settings = settings
        self._has = has
        self._distance = distance
        self._origins = origins if origins is not None else OriginLimits(OriginSettings())
        self._peers: dict[SiteId, _Peer] = {}
        self._timers: Timers[_Announce | _GraftDue] = Timers()
        # Who sent it first: a peer, or None for our own and for what was forgotten and came again.
        self._recent: OrderedDict[ChangesetId, SiteId | None] = OrderedDict()
        self._cache: OrderedDict[ChangesetId, EncodedChangeset] = OrderedDict()
        self._cache_bytes = 0
        self._announced: dict[SiteId, list[ChangesetId]] = {}  # to be sent at the next _Announce
        self._announcing = False  # while an _Announce is set
        self._missing: dict[ChangesetId, _Missing] = {}  # from the first IHave until it came or was given up
        self._out: list[Output] = []

    @property
    def eager(self) -> list[SiteId]:
        """The peers that get changesets pushed."""
        return [site for site, peer in self._peers.items() if peer.eager]

    @property
    def untried(self) -> list[SiteId]:
        """Those of the eager peers of which no push has shown yet whether they are part of the tree."""
        return [site for site, peer in self._peers.items() if peer.eager and not peer.tried]

    @property
    def lazy(self) -> list[SiteId]:
        """The peers that get changesets announced."""
        return [site for site, peer in self._peers.items() if not peer.eager]

    def measure(self) -> dict[str, tuple[int, int]]:
        """Return what each memory holds, and the most that it may hold."""
        settings = self._settings
        longest = max(map(len, self._announced.values()), default=0)
        return {
            "recent": (len(self._recent), settings.recent_max),
            "cache": (len(self._cache), settings.recent_max),
            "cache_bytes": (self._cache_bytes, settings.cache_bytes_max),
            "missing": (len(self._missing), settings.missing_max),
            "announced": (longest, settings.announced_max),
        }

    # --- inputs ---------------------------------------------------------------------------------------

    def handle_peer_up(self, site: SiteId) -> None:
        """Begin to push to a peer to which there is a link."""
        self._peers.setdefault(site, _Peer())

    def handle_peer_down(self, site: SiteId) -> None:
        """Forget a peer; if the tree hung on it, push to all that are left."""
        self._announced.pop(site, None)
        if self._peers.pop(site, None) is not None and not self.eager:
            for peer in self._peers.values():
                peer.eager = True
                peer.tried = False

    def broadcast(self, changeset: EncodedChangeset, now_ms: float) -> list[Output]:
        """Spread a changeset of our own."""
        if self._is_large(changeset):
            return self._announce_large(changeset)
        self._remember(changeset, None)
        self._spread(changeset, None, now_ms)
        return self._drain()

    def announce_pulled(self, changesets: Iterable[EncodedChangeset]) -> list[Output]:
        """Take note of what was applied: what is too large to have been pushed, peers may lack too."""
        return [
            output
            for changeset in changesets
            if self._is_large(changeset)
            for output in self._announce_large(changeset)
        ]

    def resend(self, peer: SiteId, changeset: EncodedChangeset) -> list[Output]:
        """Send a peer what it asked for with a Graft, as it was found in the log."""
        if self._is_large(changeset):
            return self._announce_large(changeset)
        return [SendFrame(peer, Push(changeset))]

    def announce_news(self, id_: ChangesetId, source: SiteId) -> list[Output]:
        """Name a changeset that a sync brought with many others: a peer that lacks it syncs with us."""
        self.counters["news_announced"] += 1
        named = Large(((*id_, 0),))
        return [SendFrame(site, named) for site in self._peers if site != source]

    def handle_message(self, peer: SiteId, message: Frame, now_ms: float) -> list[Output]:
        """Take one of the five broadcast messages from a peer."""
        match message:
            case Push():
                self._handle_push(peer, message.changeset, now_ms)
            case IHave():
                self._handle_ihave(peer, message.ids, now_ms)
            case Graft():
                self._handle_graft(peer, message.ids)
            case Large():
                if any(not self._has(site, version) for site, version, _ in message.ids):
                    self._out.append(NeedSync(peer))
            case Prune():
                self.counters["prunes_received"] += 1
                if peer in self._peers:
                    self._peers[peer].eager = False
        return self._drain()

    def forget(self, id_: ChangesetId) -> None:
        """Undo a delivery that failed, so that a later copy is delivered again."""
        self._recent.pop(id_, None)
        cached = self._cache.pop(id_, None)
        if cached is not None:
            self._cache_bytes -= len(cached.payload)

    def next_at(self) -> float | None:
        """Return when `tick` is due."""
        return self._timers.next_at()

    def tick(self, now_ms: float) -> list[Output]:
        """Announce what waits, and graft what was announced to us and did not come."""
        grafts: dict[SiteId, list[ChangesetId]] = {}
        while (token := self._timers.pop_due(now_ms)) is not None:
            if isinstance(token, _Announce):
                self._flush_announced()
            else:
                self._graft(token.id, grafts, now_ms)
        for peer, ids in grafts.items():
            self.counters["grafts_sent"] += 1
            # What is over the limit is asked for again when its timer comes up.
            self._out.append(SendFrame(peer, Graft(tuple(ids[:ITEMS_MAX]))))
        return self._drain()

    # --- messages -------------------------------------------------------------------------------------

    def _handle_push(self, peer: SiteId, changeset: EncodedChangeset, now_ms: float) -> None:
        id_ = (changeset.site, changeset.version)
        if peer in self._peers:
            self._peers[peer].tried = True
        self._missing.pop(id_, None)
        if self._knows(id_):
            self.counters["pushes_duplicate"] += 1
            if self._is_spare(peer, id_):
                self.counters["prunes_sent"] += 1
                self._out.append(SendFrame(peer, Prune()))
                if peer in self._peers:
                    self._peers[peer].eager = False
            return
        if not self._origins.admit(changeset, now_ms):
            self.counters["pushes_refused"] += 1
            return
        self.counters["pushes_new"] += 1
        if peer in self._peers:
            self._peers[peer].eager = True
        self._remember(changeset, peer)
        self._out.append(Deliver(changeset))
        self._spread(changeset, peer, now_ms)

    def _is_spare(self, peer: SiteId, id_: ChangesetId) -> bool:
        """Return whether we can do without the link that brought a duplicate.

        Only if the first copy came by another link that is still in the tree: when many sources speak at
        once each link brings some duplicate, and pruning them all would leave no tree.
        """
        if id_ not in self._recent or self._recent[id_] == peer:
            return False
        first = self._recent[id_]
        if first is None:
            return any(site != peer for site in self.eager)
        return first in self._peers and self._peers[first].eager

    def _compute_graft_timeout_ms(self) -> float:
        """Return how long the tree gets: some hops of the longest round trip that we know, if we know all."""
        farthest = max((self._distance(site) for site in self._peers), default=float("inf"))
        return min(self._settings.graft_timeout_ms, _GRAFT_TIMEOUT_MIN_MS + 4 * farthest)

    def _handle_ihave(self, peer: SiteId, ids: tuple[ChangesetId, ...], now_ms: float) -> None:
        for id_ in ids:
            if self._knows(id_) or self._origins.is_over(id_[0], now_ms):
                continue
            missing = self._missing.get(id_)
            if missing is not None:
                if peer not in missing.announcers and len(missing.announcers) < _ANNOUNCERS_MAX:
                    missing.announcers.append(peer)
            elif len(self._missing) < self._settings.missing_max:
                self._missing[id_] = _Missing([peer])
                self._timers.set(now_ms + self._compute_graft_timeout_ms(), _GraftDue(id_))
            else:
                self.counters["announcements_dropped"] += 1

    def _handle_graft(self, peer: SiteId, ids: tuple[ChangesetId, ...]) -> None:
        self.counters["grafts_received"] += 1
        if peer in self._peers:
            self._peers[peer].eager = True
        for id_ in ids:
            cached = self._cache.get(id_)
            if cached is not None:
                self._push(peer, cached)
            elif self._has(*id_):
                self._out.append(Resend(peer, id_))

    def _graft(self, id_: ChangesetId, grafts: dict[SiteId, list[ChangesetId]], now_ms: float) -> None:
        missing = self._missing.get(id_)
        if missing is None:
            return
        while missing.announcers and not self._knows(id_):
            peer = missing.announcers.pop(0)
            if peer not in self._peers:
                continue
            missing.asked = peer
            self._peers[peer].eager = True
            grafts.setdefault(peer, []).append(id_)
            self._timers.set(now_ms + self._compute_graft_timeout_ms(), _GraftDue(id_))
            return
        del self._missing[id_]
        if missing.asked is not None and not self._knows(id_) and not self._origins.is_over(id_[0], now_ms):
            self._out.append(NeedSync(missing.asked))

    # --- sending --------------------------------------------------------------------------------------

    def _is_large(self, changeset: EncodedChangeset) -> bool:
        return len(changeset.payload) > self._settings.push_bytes_max

    def _announce_large(self, changeset: EncodedChangeset) -> list[Output]:
        """Tell all peers that there is a changeset to be pulled."""
        named = Large(((changeset.site, changeset.version, len(changeset.payload)),))
        self.counters["large_announced"] += 1
        return [SendFrame(site, named) for site in sorted(self._peers, key=self._distance)]

    def _spread(self, changeset: EncodedChangeset, source: SiteId | None, now_ms: float) -> None:
        for site in sorted(self.eager, key=self._distance):
            if site != source:
                self._push(site, changeset)
        lazy = self.lazy
        if lazy and not self._announcing:
            self._announcing = True
            self._timers.set(now_ms + self._settings.announce_interval_ms, _Announce())
        for site in lazy:
            if site != source:
                waiting = self._announced.setdefault(site, [])
                if len(waiting) < self._settings.announced_max:
                    waiting.append((changeset.site, changeset.version))
                else:
                    self.counters["announcements_dropped"] += 1

    def _push(self, peer: SiteId, changeset: EncodedChangeset) -> None:
        self.counters["pushes_sent"] += 1
        if peer in self._peers:
            self._peers[peer].tried = True
        self._out.append(SendFrame(peer, Push(changeset)))

    def _flush_announced(self) -> None:
        self._announcing = False
        for peer, ids in self._announced.items():
            if ids:
                self.counters["announcements_sent"] += len(ids)
                self._out.append(SendFrame(peer, IHave(tuple(ids))))
        self._announced.clear()

    # --- memory ---------------------------------------------------------------------------------------

    def _knows(self, id_: ChangesetId) -> bool:
        return id_ in self._recent or self._has(*id_)

    def _remember(self, changeset: EncodedChangeset, source: SiteId | None) -> None:
        id_ = (changeset.site, changeset.version)
        self._recent[id_] = source
        if len(self._recent) > self._settings.recent_max:
            self._recent.popitem(last=False)
        self._cache[id_] = changeset
        self._cache_bytes += len(changeset.payload)
        too_many = len(self._cache) > self._settings.recent_max
        while too_many or self._cache_bytes > self._settings.cache_bytes_max:
            too_many = False
            _, dropped = self._cache.popitem(last=False)
            self._cache_bytes -= len(dropped.payload)

    def _drain(self) -> list[Output]:
        out, self._out = self._out, []
        return out
