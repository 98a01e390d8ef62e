"""The replays of one request: what a machine asked for, who asked, and what becomes of it.

Decides whether an instruction is carried out, where it leads, and when its time or its attempts are
over. Refuses to know connections; the exchange does what is decided here. Made when a machine asks
for the first replay, so that requests without one pay nothing. Invariant: `current` is set exactly
while an instruction is being carried out and no machine was reached yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from routing.balancer import Want
from routing.replay import (
    JSON_BYTES_MAX,
    Replay,
    ReplayError,
    format_replay_src,
    parse_replay_header,
    parse_replay_json,
    plan_replay,
)

from .errors import BAD_REPLAY, TOO_MANY_REPLAYS

if TYPE_CHECKING:
    from routing.table import Service
    from routing.target import Target

    from .framing import Data
    from .plane import Plane
    from .response_head import ResponseHead

# Where to go, and the line that only the next machine gets.
Course = tuple["Service", Want, bytes]


class Replays:
    """All replays of one exchange."""

    __slots__ = ("_fallback_used", "_pieces", "_plane", "_source", "_started", "count", "current")

    def __init__(self, plane: Plane) -> None:
        self.count = 0
        self.current: Replay | None = None  # the one being carried out; None again once it reached a machine
        self._plane = plane
        self._started = 0.0  # and the next: set with `current`
        self._source: tuple[Service, Target] | None = None  # who asked for it
        self._fallback_used = False
        self._pieces: list[Data] = []  # of a JSON instruction

    # Instructions

    def read_head(self, head: ResponseHead) -> Replay | None:
        """Return the instruction in an answer's head, or None if its body holds it. Raises ReplayError."""
        if self._fallback_used:
            raise ReplayError(BAD_REPLAY, "a request that came back as a fallback cannot be replayed")
        if head.replay_json:
            return None
        if head.replays is None or len(head.replays) != 1:
            raise ReplayError(BAD_REPLAY, "more than one fly-replay header")
        return parse_replay_header(head.replays[0])

    def read_body(self, data: Data, ended: bool) -> Replay | None:
        """Return the instruction once its last piece is here. Raises ReplayError."""
        self._pieces.append(data)
        if sum(map(len, self._pieces)) > JSON_BYTES_MAX:
            raise ReplayError(BAD_REPLAY, f"the replay instruction is longer than {JSON_BYTES_MAX} bytes")
        if not ended:
            return None
        body = b"".join(self._pieces)
        self._pieces.clear()
        return parse_replay_json(body)

    def start(self, replay: Replay, service: Service, source: Target, port: int) -> Course:
        """Begin to carry out what `source` asked for. Raises ReplayError."""
        plane = self._plane
        if self.count >= plane.settings.replays_max:
            raise ReplayError(TOO_MANY_REPLAYS, f"more than {plane.settings.replays_max} replays")
        next_service, want = plan_replay(replay, source, plane.table, port)
        self.count += 1
        plane.metrics.app(service.app).replays += 1
        plane.metrics.machine(source).replays += 1
        self.current = replay
        self._source = (service, source)
        self._started = plane.now()
        src = format_replay_src(source.id, source.region, plane.wall_us(), replay.state)
        return next_service, want, b"fly-replay-src: " + src + b"\r\n"

    # Limits

    def compute_time_left(self, now: float) -> float | None:
        """Return the seconds until the timeout of the current replay; None when it has none."""
        if self.current is None or self.current.timeout_ms is None:
            return None
        return self._started + self.current.timeout_ms / 1000 - now

    def fall_back(self, reason: str) -> Course | None:
        """Nobody could be reached: return the way back to who asked, if it wants that, once."""
        replay, source = self.current, self._source
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
        forced = replay.fallback == "force_self"
        want = Want(instance=issuer.id) if forced else Want(prefer_instance=issuer.id)
        return service, want, b"fly-replay-failed: %b\r\n" % value.encode("ascii")
