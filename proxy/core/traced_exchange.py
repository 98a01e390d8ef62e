"""An exchange that is recorded as spans: a server's, and a client's for each machine that was tried.

Decides what spans say (OpenTelemetry's semantic conventions for HTTP) and what machines are told of them.
Used in place of `Exchange` while there is a tracer, so that without one nothing is done for it. Invariant:
one span for each exchange of a recorded trace, and each of its attempts is ended by then.

Queries are left out: they hold secrets, and spans go to others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from .access_line import find_field
from .forwarding import INSECURE, read_client
from .logged_exchange import LoggedExchange
from .trace_context import TraceContext, render_traceparent, split_context

if TYPE_CHECKING:
    from routing.balancer import Want
    from routing.replay import Replay
    from routing.table import Service
    from routing.target import Target

    from .framing import Data
    from .plane import Client, Plane, SpanSink
    from .replays import Replays
    from .request_head import RequestHead
    from .response_head import ResponseHead

# As OTLP numbers them.
SERVER: Final = 2
CLIENT: Final = 3
# Others are `_OTHER`: clients can invent methods, and names of spans are to be few.
_METHODS: Final = frozenset(
    (b"DELETE", b"GET", b"HEAD", b"OPTIONS", b"PATCH", b"POST", b"PUT", b"QUERY"),
)
# Of what a client sent: bounds what waits for a slow collector.
_CHARS_MAX: Final = 1_024
_UNTRACED: Final = TraceContext(b"", b"", 0)

Attributes: TypeAlias = "dict[str, str | int | bool]"


class Span(NamedTuple):
    """One span that is over; times in microseconds since the epoch, attributes of 0 and "" are not sent."""

    context: TraceContext
    parent_id: bytes  # empty for the first one of a trace
    state: bytes
    kind: int
    name: str
    start_us: int
    end_us: int
    attributes: Attributes
    failed: bool


class Attempt:
    """One machine that was tried; it has its target's `in_flight` for as long."""

    __slots__ = ("context", "error", "replayed", "source", "start_us", "status", "target")

    def __init__(self, target: Target, context: TraceContext, start_us: int, source: str) -> None:
        self.target = target
        self.context = context
        self.start_us = start_us
        self.source = source  # the machine that asked for the replay that led here
        self.status = 0
        self.error = ""  # the code of what went wrong
        self.replayed = False  # it answered with a replay


class TracedExchange(LoggedExchange):
    """Keeps what its spans say."""

    __slots__ = (
        "attempt",
        "attempts_made",
        "context",
        "parent_id",
        "replay_source",
        "served_by",
        "spans",
        "state",
        "tracer",
    )

    def __init__(
        self, plane: Plane, client: Client, head: RequestHead, service: Service, want: Want, forwarded: bytes
    ) -> None:
        super().__init__(plane, client, head, service, want, forwarded)
        tracer = plane.tracer
        self.tracer: SpanSink | None = tracer  # None: nothing is traced, as in the base
        self.parent_id = self.state = b""
        self.context = _UNTRACED
        if tracer is not None:
            parent, self.state, head.lines = split_context(head.lines, believed=tracer.believes_clients)
            if parent is None:
                self.context = tracer.ids.begin()
            else:
                self.parent_id = parent.span_id
                self.context = parent
                if parent.is_sampled:
                    self.context = parent._replace(span_id=tracer.ids.next_span())
        self.attempt: Attempt | None = None  # the running one of a recorded trace
        self.attempts_made = 0
        self.served_by: Target | None = None  # the last machine that was tried
        self.replay_source = ""
        self.spans: list[Span] = []

    # Attempts

    def _reach(self, choice: Target) -> None:
        tracer = self.tracer
        if tracer is not None and self.context.is_sampled:
            context = self.context._replace(span_id=tracer.ids.next_span())
            self.attempt = Attempt(choice, context, self._tell_us(), self.replay_source)
            self.served_by = choice
        super()._reach(choice)

    def _render_request(self) -> bytes:
        if self.tracer is None:
            return super()._render_request()
        extra = self.extra
        context = self.context if self.attempt is None else self.attempt.context
        self.extra = extra + render_traceparent(context)
        if self.state:
            self.extra += b"tracestate: %b\r\n" % self.state
        data = super()._render_request()
        self.extra = extra
        return data

    def handle_connect_failed(self, code: str, detail: str) -> None:
        """Note why."""
        if self.attempt is not None:
            self.attempt.error = code
        super().handle_connect_failed(code, detail)

    def handle_machine_lost(self, code: str, detail: str) -> None:
        """Note why."""
        if self.attempt is not None:
            self.attempt.error = code
        super().handle_machine_lost(code, detail)

    def handle_response(self, head: ResponseHead, body: Data, ended: bool) -> None:
        """Note what the machine said, also when that is a replay."""
        if self.attempt is not None:
            self.attempt.status = head.status
        super().handle_response(head, body, ended)

    def _replay(self, replays: Replays, replay: Replay) -> None:
        if self.attempt is not None:
            self.attempt.replayed = True
            self.replay_source = self.attempt.target.id
        super()._replay(replays, replay)

    def _drop_target(self) -> None:
        attempt, self.attempt = self.attempt, None
        if attempt is not None:
            self.spans.append(self._describe_attempt(attempt))
            self.attempts_made += 1
        super()._drop_target()

    def _describe_attempt(self, attempt: Attempt) -> Span:
        target, head = attempt.target, self.head
        port = target.port or self.service.internal_port or 0
        failure = attempt.error or ("" if attempt.status else self.error)
        path = _cut(head.target.partition(b"?")[0])
        host = f"[{target.host}]" if ":" in target.host else target.host
        options = self.service.options
        scheme = "http" if options is None or options.machine_tls is None else "https"
        attributes: Attributes = {
            **_describe_method(head.method),
            "url.full": f"{scheme}://{host}:{port}{path}",
            "server.address": target.host,
            "server.port": port,
            "http.response.status_code": attempt.status,
            "http.request.resend_count": self.attempts_made,
            "error.type": failure or (str(attempt.status) if attempt.status >= 400 else ""),
            "isthmus.app": target.app,
            "isthmus.machine": target.id,
            "isthmus.region": target.region,
            "isthmus.replay_source": attempt.source,
            "isthmus.replayed": attempt.replayed,
        }
        failed = bool(failure) or attempt.status >= 400
        parent = self.context.span_id
        return self._make_span(attempt.context, parent, CLIENT, attempt.start_us, attributes, failed)

    # The whole

    def _close_books(self, status: int) -> None:
        super()._close_books(status)
        if self.tracer is not None and self.context.is_sampled:
            self.spans.append(self._describe(status))
            self.tracer.add_spans(self.spans)

    def _describe(self, status: int) -> Span:
        head, target = self.head, self.served_by
        if self.replays is not None:
            self.replays.restore_request()
        host, _, port = head.host.rpartition(b":") if _has_port(head.host) else (head.host, b"", b"")
        secure = INSECURE not in self.forwarded
        attributes: Attributes = {
            **_describe_method(head.method),
            "url.path": _cut(head.target.partition(b"?")[0]),
            "url.scheme": "https" if secure else "http",
            "server.address": _cut(host),
            "server.port": int(port[:5] or 0) or (443 if secure else 80),
            "client.address": read_client(self.forwarded).decode("ascii"),
            "network.protocol.version": f"1.{head.minor}",
            "user_agent.original": _cut(find_field(head.lines, b"user-agent:", b"")),
            "http.response.status_code": status,
            "http.request.body.size": self.body_bytes,
            "http.response.body.size": self.bytes_out,
            "error.type": self.error or (str(status) if status >= 500 else ""),
            "isthmus.request_id": self.request_id.decode("ascii"),
            "isthmus.app": self.service.app,
            "isthmus.machine": target.id if target is not None else "",
            "isthmus.region": target.region if target is not None else "",
            "isthmus.retries": self.retries,
            "isthmus.replays": self.replays.count if self.replays is not None else 0,
        }
        return self._make_span(
            self.context, self.parent_id, SERVER, self.started_us, attributes, status >= 500
        )

    def _make_span(
        self, context: TraceContext, parent: bytes, kind: int, start_us: int, said: Attributes, failed: bool
    ) -> Span:
        method = said["http.request.method"]
        name = "HTTP" if method == "_OTHER" else str(method)
        told: Attributes = {key: value for key, value in said.items() if value}
        return Span(context, parent, self.state, kind, name, start_us, self._tell_us(), told, failed)

    def _tell_us(self) -> int:
        """Return the time since the epoch, on a clock that does not jump within an exchange."""
        return self.started_us + int((self.plane.now() - self.started) * 1_000_000)


def _describe_method(method: bytes) -> Attributes:
    if method in _METHODS:
        return {"http.request.method": method.decode("ascii")}
    return {"http.request.method": "_OTHER", "http.request.method_original": _cut(method)}


def _has_port(host: bytes) -> bool:
    return host.rpartition(b":")[2].isdigit()


def _cut(value: bytes) -> str:
    return value[:_CHARS_MAX].decode("utf-8", "backslashreplace")
