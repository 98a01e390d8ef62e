"""One client's connection to one machine, until its bytes flow: for services without HTTP.

Decides which machine, when to try another one, when to wait for room, and what the log says in the end.
Refuses to know sockets and bytes. Invariant: nothing of the client is sent before the connection that it
stays with is there, so any attempt may be followed by another one; `Target.in_flight` is counted exactly
while the session holds the target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from routing.balancer import AT_LIMIT, Refusal
from routing.health import record_success

from .access_line import Entry
from .errors import ERRORS, MAINTENANCE, RETRIES_EXHAUSTED
from .phase import Phase

if TYPE_CHECKING:
    from routing.table import Service
    from routing.target import Target

    from .plane import Plane

# As in nginx's log of streams: the bytes flowed, or the client left before they did.
_RELAYED: Final = 200
_CLIENT_GONE: Final = 499


class RawClient(Protocol):
    """The client's connection."""

    port: int  # the public port that it came in on
    name: str  # the client's address
    server_name: str  # what it asked for over TLS; empty when it did not say
    bytes_in: int  # from the client to the machine
    bytes_out: int

    def make_machine(self) -> Any:
        """Return the protocol of a new connection to a machine."""

    def relay(self, machine: Any) -> None:
        """From now on pass bytes between both sides."""

    def refuse(self) -> None:
        """Cut the connection: no machine takes it."""

    def announce(self, version: str) -> bytes:
        """Return the PROXY header for this client."""


class TcpSession:
    """One session's life: `start` once, `handle_closed` once."""

    __slots__ = (
        "attempts",
        "client",
        "deadline",
        "error",
        "phase",
        "plane",
        "queued_at",
        "relaying_from",
        "service",
        "started",
        "target",
        "tried",
    )

    def __init__(self, plane: Plane, client: RawClient, service: Service) -> None:
        self.plane = plane
        self.client = client
        self.service = service
        self.phase = Phase.REACHING
        self.started = plane.now()
        self.relaying_from = 0.0  # 0 before
        self.target: Target | None = None  # whose in_flight counts this session
        self.tried: tuple[str, ...] = ()  # machines that failed
        self.attempts = 0
        self.queued_at = 0.0  # and the next: set while queued
        self.deadline = 0.0
        self.error = ""  # why there was no machine

    def start(self) -> None:
        """Look for a machine."""
        options = self.service.options
        if options is not None and options.maintenance:
            self._refuse(MAINTENANCE)
        else:
            self._attempt()

    def _attempt(self) -> None:
        plane = self.plane
        if self.attempts >= plane.settings.attempts_max:
            self._refuse(RETRIES_EXHAUSTED)
            return
        choice = plane.balancer.choose(self.service, plane.now(), tried=self.tried)
        if not isinstance(choice, Refusal):
            self._reach(choice)
            return
        wait_s = plane.compute_wait_s(choice)
        if not (wait_s and plane.queue.join(self.service.app, self)):
            self._refuse(choice.code)
        else:
            self.phase = Phase.QUEUED
            self.queued_at = plane.now()
            self.deadline = self.queued_at + wait_s

    def handle_room(self) -> bool:
        """There may be room at last: go on, or False while there is none."""
        choice = self.plane.balancer.choose(self.service, self.plane.now(), tried=self.tried)
        if isinstance(choice, Refusal):
            self.plane.compute_wait_s(choice)
            return False
        self._leave_queue()
        self._reach(choice)
        return True

    def handle_deadline(self) -> None:
        """The wait in the queue was too long."""
        self._leave_queue()
        self._refuse(AT_LIMIT)

    def _leave_queue(self) -> None:
        self.phase = Phase.REACHING
        self.plane.queue.leave(self.service.app, self, self.plane.now() - self.queued_at)

    def _reach(self, target: Target) -> None:
        self.attempts += 1
        self.target = target
        self.plane.table.busy.enter(target)
        port = self.service.upstream_port(target)
        if port is None:
            self._retry_elsewhere()
        else:
            self.plane.connector.connect(target, port, self, self.client.make_machine)

    # From the connector

    def reach_timeout_s(self) -> float:
        """Return how long a connection may take."""
        return self.plane.settings.connect_timeout_s

    def announcement(self) -> bytes:
        """Return the PROXY header that the connection begins with, if the service wants one."""
        options = self.service.options
        if options is None or not options.proxy_protocol:
            return b""
        return self.client.announce(options.proxy_protocol)

    def handle_connected(self, machine: Any) -> None:
        """The connection asked for is there."""
        target = self.target
        if target is None:
            machine.abort()
            return
        record_success(target)
        self.plane.metrics.machine(target).connections += 1
        self.phase = Phase.RELAYING
        self.relaying_from = self.plane.now()
        self.client.relay(machine)

    def handle_connect_failed(self, code: str, detail: str) -> None:  # noqa: ARG002 - nobody is told the detail
        """The connection asked for could not be made: the next machine, at once."""
        self.plane.metrics.count_connect_failure(code)
        if self.target is not None:
            self.plane.table.failing.record(self.target, self.plane.now())
            self.plane.metrics.machine(self.target).failures += 1
            self._retry_elsewhere()

    def handle_shortage(self, code: str, detail: str) -> None:  # noqa: ARG002 - as above
        """The connection asked for cannot be made by this node; the machine is not to blame."""
        if self.target is not None:
            self._refuse(code)

    def _retry_elsewhere(self) -> None:
        target = self.target
        assert target is not None
        self.tried = (*self.tried, target.id)
        self.plane.metrics.app(self.service.app).retries += 1
        self._drop_target()
        self._attempt()

    # Ends

    def handle_closed(self) -> None:
        """The client's connection is closed, and with it the machine's, if there was one."""
        if self.phase is Phase.QUEUED:
            self._leave_queue()
        self.phase = Phase.DONE
        target = self.target
        self._drop_target()
        log = self.plane.access_log
        if log is not None and log.samples():
            log.add(self._describe(target))

    def _refuse(self, code: str) -> None:
        self.error = code
        self.plane.metrics.count_error(code, self.service.app)
        self.client.refuse()

    def _drop_target(self) -> None:
        if self.target is not None:
            self.target.in_flight -= 1
            app, self.target = self.target.app, None
            self.plane.queue.offer(app)

    def _describe(self, target: Target | None) -> Entry:
        plane, client = self.plane, self.client
        duration_s = plane.now() - self.started
        status = ERRORS[self.error][0] if self.error else _RELAYED if self.relaying_from else _CLIENT_GONE
        return Entry(
            started_us=plane.wall_us() - int(duration_s * 1_000_000),
            request_id=plane.request_ids.next(plane.wall_us() // 1_000),
            client=client.name.encode("ascii"),
            method=b"TCP",
            host=client.server_name.encode("ascii"),
            target=b":%d" % client.port,
            minor=-1,
            lines=[],
            status=status,
            bytes_in=client.bytes_in,
            bytes_out=client.bytes_out,
            duration_s=duration_s,
            first_byte_s=self.relaying_from - self.started if self.relaying_from else 0.0,
            app=self.service.app,
            machine=target.id if target is not None else "",
            region=target.region if target is not None else "",
            retries=len(self.tried),
            replays=0,
            error=self.error,
        )
