"""One request and its answer, from the complete head on.

Decides when to choose, send, retry, replay, relay and give up. Refuses to know sockets, parsers and
time. It is driven by `handle_` calls and acts by direct calls on its neighbours (see `plane`):
objects for every effect would cost as much as the parser.

Invariants: the client gets one final answer, or its connection is cut; a request is sent again only
while none of the answer was passed on and the whole body is still here; `Target.in_flight` is
counted exactly while the exchange holds the target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from routing.balancer import AT_LIMIT, Refusal, Want
from routing.health import record_success
from routing.replay import Replay, ReplayError

from .adapting import adapt_response
from .errors import (
    BAD_RESPONSE,
    BODY_OVER_LIMIT,
    BODY_TOO_LARGE,
    CONNECT_FAILED,
    ERRORS,
    MAINTENANCE,
    RETRIES_EXHAUSTED,
    START_TIMEOUT,
    UPSTREAM_RESET,
    count_body,
    prefers_plain,
    render_error,
)
from .framing import COPIED_BYTES_MAX, LAST_CHUNK, BodyTooLargeError, encode_chunk
from .phase import DONE, QUEUED, REACHING, READING_REPLAY, RELAYING, WAITING
from .rendering import render_informational, render_request, render_response, render_switch
from .replays import Replays
from .request_head import IDEMPOTENT, WITH_BODY
from .response_head import SWITCHING_PROTOCOLS
from .stickiness import keep_to_machine, tell_machine

if TYPE_CHECKING:
    from routing.table import Service
    from routing.target import Target

    from .compression import Encoder
    from .framing import Data
    from .plane import Client, Machine, Plane
    from .replays import Course
    from .request_head import RequestHead
    from .response_head import ResponseHead


# nginx's, for the log and the counters: nobody gets to see it.
_CLIENT_GONE: Final = 499
_UNLIMITED: Final = float("inf")


class Exchange:
    """One request's life. `forwarded` are the lines that tell the machine about the client."""

    __slots__ = (
        "attempts",
        "body_bytes",
        "body_ended",
        "body_lost",
        "body_max",
        "bytes_out",
        "chunk_response",
        "client",
        "continued",
        "deadline",
        "encoder",
        "extra",
        "forwarded",
        "fresh",
        "head",
        "informational",
        "kept",
        "last_failure",
        "machine",
        "phase",
        "plane",
        "queued_at",
        "replays",
        "request_id",
        "resends",
        "service",
        "started",
        "started_us",
        "status",
        "target",
        "tried",
        "want",
    )

    def __init__(
        self, plane: Plane, client: Client, head: RequestHead, service: Service, want: Want, forwarded: bytes
    ) -> None:
        self.plane = plane
        self.client = client
        self.head = head
        self.service = service
        self.want = want
        self.forwarded = forwarded
        self.phase = REACHING
        self.started = plane.now()
        self.started_us = plane.wall_us()
        self.request_id = plane.request_ids.next(self.started_us // 1000)
        self.target: Target | None = None  # whose in_flight counts this exchange
        self.machine: Machine | None = None  # set from `_send` until released or closed
        self.tried: tuple[str, ...] = ()  # machines that failed since the last replay
        self.attempts = 0  # connections asked for since the last replay
        self.resends = 0  # times the request was sent again after a machine had it
        self.fresh = False  # the next connection must be a new one
        self.last_failure = ""  # why the last attempt failed, for the message
        self.queued_at = 0.0  # and the next: set while queued
        self.deadline = 0.0
        # The request body.
        self.kept: list[Data] | None = None  # all of it so far, while it can be sent again
        self.body_bytes = 0
        self.body_lost = False  # some of it is no longer kept
        self.body_max: float = _UNLIMITED  # of an app that it was replayed to
        self.body_ended = False
        self.continued = False  # a 100 (Continue) went to the client
        # The answer.
        self.informational = 0
        self.status = 0
        self.bytes_out = 0  # of the answer's body as they are sent, without chunk framing
        self.chunk_response = False
        self.encoder: Encoder | None = None  # while the answer is compressed
        self.replays: Replays | None = None  # set when a machine asks for the first one
        self.extra = b""  # lines that only the next machine gets

    # From the client

    def start(self, body: Data, ended: bool) -> None:
        """Take up the request with the first bytes of its body. Call once."""
        self.plane.metrics.in_flight += 1
        self.body_ended = ended
        if body:
            self.kept = [body]
            self.body_bytes = len(body)
        options = self.service.options
        if options is not None and options.sticky is not None:
            self.want = keep_to_machine(self.want, self.head, options.sticky)
        if self.service.cached_replays is not None:
            self._recall_replay()
        else:
            self._attempt()

    def handle_request_body(self, data: Data, ended: bool) -> None:
        """Take more of the request body; `data` may be empty when `ended`. Raises BodyTooLargeError."""
        self.body_ended = ended
        if data:
            self.body_bytes += len(data)
            if self.body_bytes > self.body_max:
                raise BodyTooLargeError(f"more than {self.body_max} bytes")
            if not self.body_lost:
                if self.kept is None:
                    self.kept = []
                self.kept.append(data)
                if self.body_bytes > self.plane.body_kept_max:
                    self._limit_kept()
        machine = self.machine
        if machine is not None:
            if self.head.chunked:
                data = encode_chunk(data) if data else b""
                if ended:
                    data += LAST_CHUNK
            if data:
                machine.write(data)
            if ended:
                machine.await_response()

    def _limit_kept(self) -> None:
        if self.machine is not None:
            self.kept = None
            self.body_lost = True
        else:
            self.client.pause_body()

    def handle_client_lost(self, code: str = "") -> None:
        """The client is gone, or its request will never be complete, as `code` says: stop everything."""
        if self.phase is not DONE:
            self.plane.metrics.aborted["client"] += 1
            self._leave_machine()
            self._close_books(ERRORS[code][0] if code else _CLIENT_GONE)

    def has_answered(self) -> bool:
        """True once a part of the final answer was passed on."""
        return self.phase is RELAYING

    def handle_client_slow(self, slow: bool) -> None:
        """The client's connection has too much to send, or has room again."""
        if self.machine is not None:
            if slow:
                self.machine.pause_reading()
            else:
                self.machine.resume_reading()

    # Choosing and connecting

    def _attempt(self) -> None:
        plane = self.plane
        now = plane.now()
        self.phase = REACHING
        options = self.service.options
        if options is not None and options.maintenance:
            self._fail(MAINTENANCE, "", options.maintenance)
            return
        if self.replays is not None and self._seconds_left(now) <= 0:
            self._fail_to_reach("timeout", RETRIES_EXHAUSTED, "the replay's timeout passed")
            return
        if self.attempts >= plane.settings.attempts_max:
            self._fail_to_reach("retries_exhausted", RETRIES_EXHAUSTED, self.last_failure)
            return
        choice = plane.balancer.choose(self.service, now, self.want, self.tried)
        if not isinstance(choice, Refusal):
            self._reach(choice)
        elif not self._queue(now, choice):
            reason = "retries_exhausted" if self.tried else "no_candidate"
            detail = f"{choice.reason}; {self.last_failure}" if self.last_failure else choice.reason
            self._fail_to_reach(reason, choice.code, detail)

    def _queue(self, now: float, choice: Refusal) -> bool:
        """Wait for room, or for a machine to start; False when that would be in vain, or the line is full."""
        wait_s = self.plane.compute_wait_s(choice)
        if not wait_s or not self.plane.queue.join(self.service.app, self):
            return False
        self.phase = QUEUED
        self.queued_at = now
        self.deadline = now + min(wait_s, self._seconds_left(now))
        return True

    def _leave_queue(self) -> None:
        self.phase = REACHING
        self.plane.queue.leave(self.service.app, self, self.plane.now() - self.queued_at)

    def handle_room(self) -> bool:
        """There may be room at last: go on, or False while there is none for this request."""
        choice = self.plane.balancer.choose(self.service, self.plane.now(), self.want, self.tried)
        if isinstance(choice, Refusal):
            # Whatever it is by now: the deadline tells the client. A start that got lost is asked for again.
            self.plane.compute_wait_s(choice)
            return False
        self._leave_queue()
        self._reach(choice)
        return True

    def handle_deadline(self) -> None:
        """The wait in the queue was too long."""
        self._leave_queue()
        choice = self.plane.balancer.choose(self.service, self.plane.now(), self.want, self.tried)
        if isinstance(choice, Refusal) and choice.asleep is not None:
            problem = choice.asleep.problem or "it is not there yet"
            self._fail_to_reach("timeout", START_TIMEOUT, f"machine {choice.asleep.id}: {problem}")
        else:
            self._fail_to_reach("timeout", AT_LIMIT, "no machine had room in time")

    def _reach(self, choice: Target) -> None:
        plane = self.plane
        if self.attempts and not self._take_retry():
            detail = f"too many requests of the app are retries already; {self.last_failure}"
            self._fail_to_reach("retries_exhausted", RETRIES_EXHAUSTED, detail)
            return
        self.attempts += 1
        self.target = choice
        plane.table.busy.enter(choice)
        port = choice.port or self.service.internal_port
        if port is None:
            self._retry_elsewhere(CONNECT_FAILED, f"machine {choice.id} has no port")
            return
        # A connection that begins with a PROXY header is of one client, and is not kept.
        fresh = self.fresh or (self.service.options is not None and bool(self.service.options.proxy_protocol))
        machine = plane.connector.acquire(choice, port, self, fresh=fresh)
        if machine is not None:
            self._send(machine)

    def _seconds_left(self, now: float) -> float:
        """Return how long the replay that is being carried out may still take."""
        left = self.replays.compute_time_left(now) if self.replays is not None else None
        return _UNLIMITED if left is None else left

    def reach_timeout_s(self) -> float:
        """Return how long a connection for this exchange may take."""
        return max(0.001, min(self.plane.settings.connect_timeout_s, self._seconds_left(self.plane.now())))

    def handle_connected(self, machine: Machine) -> None:
        """The connection asked for is there."""
        assert self.target is not None or self.phase is DONE
        if self.phase is DONE:
            machine.release()
            return
        if self.target is not None:
            record_success(self.target)
            self.plane.metrics.machine(self.target).connections += 1
        self._send(machine)

    def handle_connect_failed(self, code: str, detail: str) -> None:
        """The connection asked for could not be made: the next machine, at once."""
        self.plane.metrics.count_connect_failure(code)
        if self.target is not None:
            # Only failed connections count: a reset may be what this one request does to any machine.
            self.plane.table.failing.record(self.target, self.plane.now())
            self.plane.metrics.machine(self.target).failures += 1
        if self.phase is not DONE:
            self._retry_elsewhere(code, detail)

    def may_send_early(self) -> bool:
        """True when the request can be sent before its machine is known to be reached: all of it is kept."""
        kept = self.body_ended and self.body_bytes <= self.plane.body_kept_max
        return kept and self.replays is None

    def handle_unreached(self, code: str, detail: str) -> None:
        """The node that took the request did not reach the machine, which got nothing of it."""
        self.machine = None
        self.handle_connect_failed(code, detail)

    def handle_shortage(self, code: str, detail: str) -> None:
        """The connection asked for cannot be made by this node; the machine is not to blame."""
        if self.phase is not DONE:
            self._fail(code, detail)

    def _take_retry(self) -> bool:
        """True, and counted, if the app's requests may be sent once more."""
        return self.plane.retries.take(self.service.app, self.plane.now())

    def announcement(self) -> bytes:
        """Return the PROXY header that a new connection begins with, if the service wants one."""
        options = self.service.options
        if options is None or not options.proxy_protocol:
            return b""
        return self.client.announce(options.proxy_protocol, self.forwarded)

    def _retry_elsewhere(self, code: str, detail: str) -> None:
        target = self.target
        assert target is not None
        self.tried = (*self.tried, target.id)
        self.last_failure = f"[{code}] {detail}"
        self._drop_target()
        self._attempt()

    def _fail_to_reach(self, reason: str, code: str, detail: str) -> None:
        """Nobody could be reached: back to who asked for the replay if it wants that, else give up."""
        course = self.replays.fall_back(reason, code) if self.replays is not None else None
        if course is None:
            self._fail(code, detail)
        else:
            self._follow(course)

    # Sending

    def _send(self, machine: Machine) -> None:
        self.machine = machine
        self.phase = WAITING
        if self.replays is not None:
            self.replays.current = None  # reached: neither its timeout nor its fallback count any more
        self.fresh = False
        machine.begin(self)
        data = self._render_request()
        kept = self.kept
        if self.head.chunked:
            pieces = [data]
            if kept:
                pieces.append(encode_chunk(b"".join(kept)))
            if self.body_ended:
                pieces.append(LAST_CHUNK)
            data = b"".join(pieces)
        elif kept:
            data = b"".join((data, *kept))
        if self.body_bytes > self.plane.body_kept_max:
            self._limit_kept()
        if not self.body_ended:
            # Before the write, which may find that the machine is slow and pause the client again.
            self.client.resume_body()
        machine.write(data)
        if self.body_ended:
            machine.await_response()

    def _render_request(self) -> bytes:
        return render_request(self)

    def handle_machine_slow(self, slow: bool) -> None:
        """The machine's connection has too much to send, or has room again."""
        if self.phase is not DONE and not self.body_ended:
            if slow:
                self.client.pause_body()
            else:
                self.client.resume_body()

    # The answer

    def handle_informational(self, head: ResponseHead) -> bool:
        """Pass on a 1xx other than 101; False when there were too many."""
        self.informational += 1
        if self.informational > self.plane.settings.informational_max:
            return False
        if head.status == 100:
            if not self.head.expects or self.continued:
                return True
            self.continued = True
        if self.head.minor == 1:
            self.client.write(render_informational(head))
        return True

    def handle_response(self, head: ResponseHead, body: Data, ended: bool) -> None:
        """Take the final head with the first bytes of its body, as decoded."""
        if head.replays is not None or head.replay_json:
            self._take_replay(head, body, ended)
            return
        if head.status == SWITCHING_PROTOCOLS:
            self._switch_protocols(head, bytes(body))
            return
        self.phase = RELAYING
        self.status = head.status
        options = self.service.options
        if options is not None:
            if options.sticky is not None:
                tell_machine(head, options.sticky, self.want, self.target)
            self.encoder, body = adapt_response(options, self.plane, self.head, head, body, ended)
        self._frame_response(head)
        data = render_response(self, head)
        self.bytes_out = len(body)
        if self.chunk_response:
            data += encode_chunk(body) if body else b""
            data += LAST_CHUNK if ended else b""
            self.client.write(data)
        elif len(body) <= COPIED_BYTES_MAX:
            self.client.write(data + body)
        else:
            self.client.writelines((data, body))
        if ended:
            self._complete()

    def _frame_response(self, head: ResponseHead) -> None:
        """Decide where the body of the answer ends for the client."""
        request = self.head
        if head.content_length < 0 and not head.is_bodiless(to_head=request.method == b"HEAD"):
            if request.minor == 1:
                self.chunk_response = True
            else:
                request.keep_alive = False  # the end of the connection is the end of the body
        if self.plane.draining:
            request.keep_alive = False

    def keeps_client(self) -> bool:
        """True when the client's connection may carry another request after this answer."""
        if not self.head.keep_alive:
            return False
        if self.body_ended:
            return True
        # An early answer. A client that was never told to continue may or may not send its body now.
        if self.head.expects and not self.continued and not self.body_bytes:
            return False
        left = self.head.content_length - self.body_bytes
        return not self.head.chunked and left <= self.plane.settings.discard_bytes_max

    def handle_response_body(self, data: Data, ended: bool) -> None:
        """Take more of the answer's body, as decoded; `data` may be empty when `ended`."""
        if self.phase is READING_REPLAY:
            self._collect_replay(data, ended)
            return
        if self.encoder is not None:
            data = self.encoder.encode(data, ended)
        self.bytes_out += len(data)
        if self.chunk_response:
            data = encode_chunk(data) if data else b""
            if ended:
                data += LAST_CHUNK
        if data:
            self.client.write(data)
        if ended:
            self._complete()

    def is_verbatim(self) -> bool:
        """Return True while the rest of the answer's body goes on as it comes."""
        return self.phase is RELAYING and self.encoder is None and not self.chunk_response

    def count_spliced(self, size: int, *, waits: bool) -> None:
        """Count bytes of the answer that went past the proxy; `waits` when the client takes no more."""
        self.bytes_out += size
        self.client.await_reader(waits=waits)

    def _complete(self) -> None:
        keep = self.keeps_client()
        machine = self.machine
        self.machine = None
        if machine is not None:
            # A machine that waits for the rest of a body, or ignores bodies where they are unusual, would
            # take the body for the next request: never another request behind that.
            if self.body_ended and (not self.body_bytes or self.head.method in WITH_BODY):
                machine.release()
            else:
                machine.close()
        self._close_books(self.status)
        self.client.finish(keep=keep)

    def _switch_protocols(self, head: ResponseHead, data: bytes) -> None:
        machine = self.machine
        assert machine is not None
        if self.head.upgrade is None or head.upgrade != self.head.upgrade:
            self._leave_machine()
            self._fail(BAD_RESPONSE, "the machine switched to a protocol that was not asked for")
            return
        self.client.write(render_switch(self, head))
        self.plane.metrics.tunnels += 1
        self.phase = RELAYING
        self.status = SWITCHING_PROTOCOLS
        self.client.start_tunnel(machine, data)

    def count_tunnelled(self, received: int, sent: int) -> None:
        """Count bytes that went through the tunnel, from and to the client."""
        self.body_bytes += received
        self.bytes_out += sent

    def handle_tunnel_closed(self) -> None:
        """The tunnel is over; until now the machine counted as busy with it."""
        self.machine = None
        if self.phase is not DONE:
            self._close_books(self.status)

    def handle_machine_lost(self, code: str, detail: str) -> None:
        """The machine's connection failed, timed out or broke the protocol; it is closed already."""
        machine = self.machine
        self.machine = None
        if self.phase is DONE or machine is None:
            return
        if self.target is not None:
            self.plane.metrics.machine(self.target).failures += 1
        if self.phase is RELAYING:
            self.plane.metrics.aborted["machine"] += 1
            self._close_books(self.status)
            self.client.abort()
            return
        unanswered = self.phase is WAITING and code == UPSTREAM_RESET and not self.informational
        if unanswered and not self.body_lost and self.head.method in IDEMPOTENT:
            if machine.reused:
                # Most likely an idle connection that its machine was about to close.
                self.fresh = True
                self.last_failure = f"[{code}] {detail}"
                self._drop_target()
                self._attempt()
                return
            if not self.resends:
                # Once: a request that kills its machine must not go round.
                self.resends += 1
                self._retry_elsewhere(code, detail)
                return
        self._fail(code, detail)

    # Replays

    def _recall_replay(self) -> None:
        self.replays = Replays(self.plane, self.head)
        course = self.replays.recall(self.service, self.want, self.client.port)
        if course is None:
            self._attempt()
        else:
            self._follow(course)

    def _take_replay(self, head: ResponseHead, body: Data, ended: bool) -> None:
        if self.replays is None:
            self.replays = Replays(self.plane, self.head)
        try:
            replay = self.replays.read_head(head)
        except ReplayError as error:
            self._release_machine(ended=ended)
            self._fail(error.code, error.message)
            return
        if replay is not None:
            self._release_machine(ended=ended)
            self._replay(self.replays, replay)
        else:
            self.phase = READING_REPLAY
            self._collect_replay(body, ended)

    def _collect_replay(self, data: Data, ended: bool) -> None:
        replays = self.replays
        assert replays is not None
        try:
            replay = replays.read_body(data, ended)
        except ReplayError as error:
            self._release_machine(ended=ended)
            self._fail(error.code, error.message)
            return
        if replay is not None:
            self._release_machine(ended=True)
            self._replay(replays, replay)

    def _replay(self, replays: Replays, replay: Replay) -> None:
        source = self.target
        assert source is not None
        self._drop_target()
        if self.body_lost:
            self._fail(BODY_TOO_LARGE, f"more than {self.plane.settings.replay_body_bytes_max} bytes")
            return
        try:
            course = replays.start(replay, self.service, source, self.client.port)
        except ReplayError as error:
            self._fail(error.code, error.message)
            return
        self.informational = 0
        self._follow(course)

    def _follow(self, course: Course) -> None:
        self.service, self.want, self.extra = course
        self.last_failure = ""
        self.tried = ()
        self.attempts = 0
        # The limit of the app that the client named was looked at before; this one may have a lower one.
        options = self.service.options
        limit = options.body_bytes_max if options is not None else 0
        self.body_max = limit or _UNLIMITED
        if limit and max(self.head.content_length, self.body_bytes) > limit:
            self._fail(BODY_OVER_LIMIT, f"more than {limit} bytes")
        else:
            self._attempt()

    # Ends

    def _release_machine(self, *, ended: bool) -> None:
        machine = self.machine
        self.machine = None
        if machine is None:
            return
        if not self.body_ended:
            machine.close()
        elif ended:
            machine.release()
        else:
            machine.discard()

    def _leave_machine(self) -> None:
        machine = self.machine
        self.machine = None
        if machine is not None:
            machine.close()

    def _drop_target(self) -> None:
        if self.target is not None:
            self.target.in_flight -= 1
            app, self.target = self.target.app, None
            self.plane.queue.offer(app)

    def _close_books(self, status: int) -> None:
        if self.phase is QUEUED:
            self._leave_queue()
        self.phase = DONE
        self.kept = None
        plane = self.plane
        if self.encoder is not None:
            plane.metrics.end_compression(self.encoder)
            self.encoder = None
        plane.metrics.in_flight -= 1
        plane.metrics.record(
            self.service.app, self.target, status, plane.now() - self.started, self.body_bytes, self.bytes_out
        )
        self._drop_target()

    def _fail(self, code: str, detail: str, page: str = "") -> None:
        """Answer with an error of our own; nothing of an answer has been passed on."""
        self._leave_machine()
        keep = self.keeps_client() and not self.plane.draining
        self.plane.metrics.count_error(code, self.service.app)
        data = self._render_failure(code, detail, page, keep=keep)
        self.bytes_out = count_body(data)
        self._close_books(int(data[9:12]))
        self.client.write(data)
        self.client.finish(keep=keep)

    def _render_failure(self, code: str, detail: str, page: str, *, keep: bool) -> bytes:
        return render_error(
            code,
            detail,
            self.request_id,
            plain=prefers_plain(self.head.lines),
            close=not keep,
            with_body=self.head.method != b"HEAD",
            page=page,
        )
