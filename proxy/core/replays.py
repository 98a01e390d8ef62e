"""The replays of one request: what a machine asked for, who asked, and what becomes of it.

Decides whether an instruction is carried out, where it leads, what of it is remembered, and when its time
or its attempts are over. Refuses to know connections; the exchange does what is decided here. Made when a
machine asks for the first replay, or one may be remembered, so that other requests pay nothing. Invariant:
`current` is set exactly while an instruction is being carried out and no machine was reached yet.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from routing.balancer import AT_LIMIT, Want
from routing.replay import (
    JSON_BYTES_MAX,
    Replay,
    ReplayError,
    format_replay_src,
    parse_replay_header,
    parse_replay_json,
    plan_replay,
)
from routing.transform import read_cache_fields

from .errors import BAD_REPLAY, TOO_MANY_REPLAYS
from .response_head import SWITCHING_PROTOCOLS
from .transforms import apply_transform, find_values

if TYPE_CHECKING:
    from routing.table import Service
    from routing.target import Target

    from .framing import Data
    from .plane import Plane
    from .replay_cache import Entry
    from .request_head import RequestHead
    from .response_head import ResponseHead
    from .transforms import Original

# Where to go, and the lines that only the next machine gets.
Course = tuple["Service", Want, bytes]

_BYPASS: Final = b"fly-replay-cache-control"


class Replays:
    """All replays of one exchange."""

    __slots__ = (
        "_body_bytes",
        "_cache_status",
        "_fallback_used",
        "_head",
        "_origin",
        "_original",
        "_pieces",
        "_plane",
        "_recalled",
        "_source",
        "_started",
        "_want",
        "count",
        "current",
    )

    def __init__(self, plane: Plane, head: RequestHead) -> None:
        self.count = 0
        self.current: Replay | None = None  # the one being carried out; None again once it reached a machine
        self._plane = plane
        self._head = head  # of the client's request
        self._original: Original | None = None  # what a transform has changed in it; None while nothing is
        self._started = 0.0  # and the next: set with `current`
        self._source: tuple[Service, Target] | None = None  # who asked for it
        self._fallback_used = False
        self._pieces: list[Data] = []  # of a JSON instruction
        self._body_bytes = 0  # in them
        self._origin: Service | None = None  # which the client's request led to; set by the first use
        self._want = Want()  # what the client asked for; set with `_recalled`
        self._recalled: Entry | None = None  # what is carried out now, if it was remembered
        self._cache_status = b"miss"

    # Instructions

    def read_head(self, head: ResponseHead) -> Replay | None:
        """Return the instruction in an answer's head, or None if its body holds it. Raises ReplayError."""
        if self._fallback_used:
            raise ReplayError(BAD_REPLAY, "a request that came back as a fallback cannot be replayed")
        if head.status == SWITCHING_PROTOCOLS:
            raise ReplayError(BAD_REPLAY, "the machine has switched protocols already")
        if head.replay_json:
            return None
        if head.replays is None or len(head.replays) != 1:
            raise ReplayError(BAD_REPLAY, "more than one fly-replay header")
        replay = parse_replay_header(head.replays[0])
        wish = None if head.replay_cache is None else read_cache_fields(head.replay_cache)
        return replay if wish is None else replace(replay, cache=wish)

    def read_body(self, data: Data, ended: bool) -> Replay | None:
        """Return the instruction once its last piece is here. Raises ReplayError."""
        self._pieces.append(data)
        self._body_bytes += len(data)
        if self._body_bytes > JSON_BYTES_MAX:
            raise ReplayError(BAD_REPLAY, f"the replay instruction is longer than {JSON_BYTES_MAX} bytes")
        if not ended:
            return None
        body = b"".join(self._pieces)
        self._pieces.clear()
        self._body_bytes = 0
        return parse_replay_json(body)

    def start(self, replay: Replay, service: Service, source: Target, port: int) -> Course:
        """Begin to carry out what `source` asked for. Raises ReplayError."""
        plane = self._plane
        self.restore_request()
        if self.count >= plane.settings.replays_max:
            raise ReplayError(TOO_MANY_REPLAYS, f"more than {plane.settings.replays_max} replays")
        next_service, want = plan_replay(replay, source, plane.table, port)
        self._remember(replay, service, source)
        if replay.transform is not None:
            self._original = apply_transform(self._head, replay.transform)
        self.count += 1
        plane.metrics.app(service.app).replays += 1
        plane.metrics.machine(source).replays += 1
        self.current = replay
        self._source = (service, source)
        self._started = plane.now()
        src = format_replay_src(source.id, source.region, plane.wall_us(), replay.state)
        extra = b"fly-replay-src: %b\r\nfly-replay-cache-status: %b\r\n" % (src, self._cache_status)
        return next_service, want, extra

    def restore_request(self) -> None:
        """Undo what the last replay changed in the request."""
        if self._original is not None:
            self._original.put_back(self._head)
            self._original = None

    # The cache

    def recall(self, service: Service, want: Want, port: int) -> Course | None:
        """Return where a remembered replay leads, before any machine has the request."""
        plane = self._plane
        self._origin, self._want = service, want
        entry = plane.replay_cache.find(service, self._head, plane.now())
        if entry is None:
            return None
        counted = plane.metrics.app(service.app)
        if entry.allow_bypass and b"skip" in find_values(self._head, _BYPASS):
            self._cache_status = b"bypass"
            counted.count_cached("bypass")
            return None
        try:
            next_service, next_want = plan_replay(entry.replay, entry.source, plane.table, port)
        except ReplayError:
            plane.replay_cache.drop(entry)
            counted.count_cached("gone")
            return None
        self.current = entry.replay
        self._recalled = entry
        counted.count_cached("hit")
        return next_service, next_want, b"fly-replay-cache-status: hit\r\n"

    def _remember(self, replay: Replay, service: Service, source: Target) -> None:
        """Remember or forget what leads on from the service that the client's request led to."""
        cache, now = self._plane.replay_cache, self._plane.now()
        self._recalled = None
        if self._origin is None:
            self._origin = service
        origin = self._origin
        if replay.cache is not None and replay.cache.invalidate:
            entry = cache.find(origin, self._head, now)
            if entry is not None:
                cache.drop(entry)
                self._plane.metrics.app(origin.app).count_cached("invalidated")
        elif service is origin:
            # What others ask for cannot be looked up: that is done once, before the first machine.
            outcome = cache.learn(origin, source, replay, self._head, now)
            if outcome:
                self._plane.metrics.app(origin.app).count_cached(outcome)

    # Limits

    def compute_time_left(self, now: float) -> float | None:
        """Return the seconds until the timeout of the current replay; None when it has none."""
        if self.current is None or self.current.timeout_ms is None:
            return None
        return self._started + self.current.timeout_ms / 1000 - now

    def fall_back(self, reason: str, code: str) -> Course | None:
        """Nobody could be reached: return the way back to who asked, if it wants that, once.

        Behind a remembered replay that is the app, as if nothing had been remembered. But a target that is
        merely full stays: the app would send the request there again.
        """
        replay, source = self.current, self._source
        entry = self._recalled
        if replay is not None and entry is not None:
            self._recalled = self.current = None
            if code == AT_LIMIT:
                return None
            self._plane.replay_cache.drop(entry)
            self._plane.metrics.app(entry.service.app).count_cached("gone")
            return entry.service, self._want, b""
        if replay is None or replay.fallback is None or source is None or self._fallback_used:
            return None
        service, issuer = source
        named = {
            "instance": replay.instance or replay.prefer_instance,
            "app": replay.app,
            "region": ",".join(replay.regions),
            "replay_source": issuer.id,
            "reason": reason,
            "elapsed_ms": str(int((self._plane.now() - self._started) * 1000)),
        }
        value = ";".join(f"{name}={text}" for name, text in named.items() if text)
        self._fallback_used = True
        self.current = None
        self.restore_request()
        forced = replay.fallback == "force_self"
        want = Want(instance=issuer.id) if forced else Want(prefer_instance=issuer.id)
        return service, want, b"fly-replay-failed: %b\r\n" % value.encode("ascii")
