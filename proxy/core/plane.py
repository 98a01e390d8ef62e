"""What an exchange works with: the neighbours that it calls, and what all exchanges share.

Decides nothing. Refuses to know sockets: everything here is plain data or an interface.
Invariant: the calls named here never raise, and may call back into the exchange before they return
only where their docstring says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from routing.balancer import ANYWHERE

from .replay_cache import ReplayCache
from .retry_budget import RetryBudgets

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.metrics import ProxyMetrics
    from proxy.settings import ProxySettings
    from routing.balancer import Refusal, Want
    from routing.table import RoutingTable, Service
    from routing.target import Target

    from .access_line import Entry
    from .exchange import Exchange
    from .framing import Data
    from .queue import Queue
    from .request_id import RequestIds
    from .trace_context import TraceIds
    from .traced_exchange import Span


class Client(Protocol):
    """The client's connection."""

    port: int  # the public port that it came in on

    def write(self, data: Data) -> None:
        """Send bytes of the answer."""

    def writelines(self, pieces: tuple[Data, ...]) -> None:
        """Send bytes of the answer that are too large to be joined first; in one system call."""

    def give_socket(self) -> Any:
        """Return a socket that the answer may go to past `write`; None when there is none now."""
        return None

    def is_blocked(self) -> bool:
        """Return True while more waits to be sent than should."""
        return False

    def await_reader(self, *, waits: bool) -> None:
        """Give the client its time to take what goes past `write`; not `waits`: it took all there was."""

    def pause_body(self) -> None:
        """Stop reading the request body until `resume_body`."""

    def resume_body(self) -> None:
        """Go on reading the request body."""

    def finish(self, *, keep: bool) -> None:
        """End the exchange: the answer is complete. May start the next exchange."""

    def abort(self) -> None:
        """End the exchange by cutting the connection: the answer cannot be completed."""

    def announce(self, version: str, forwarded: bytes) -> bytes:
        """Return the PROXY header for the client of a request that has these lines about it."""

    def start_tunnel(self, machine: Machine, data: bytes) -> None:
        """End the exchange; from now on pass bytes between both sides. `data` came from the machine."""


class Machine(Protocol):
    """A connection to a machine."""

    reused: bool  # whether it has carried an exchange before

    def begin(self, exchange: Exchange) -> None:
        """Deliver what comes from now on to this exchange, as the answer to one request."""

    def write(self, data: Data) -> None:
        """Send bytes of the request."""

    def await_response(self) -> None:
        """The request is sent: from now on the machine has a limited time to answer."""

    def pause_reading(self) -> None:
        """Stop reading the answer until `resume_reading`."""

    def resume_reading(self) -> None:
        """Go on reading the answer."""

    def release(self) -> None:
        """End the exchange; keep the connection for others if its state allows that."""

    def discard(self) -> None:
        """End the exchange; read the rest of the answer if it is small, then as `release`."""

    def close(self) -> None:
        """End the exchange and the connection."""


class TunnelEnd(Protocol):
    """The side of a tunnel that is not the machine's."""

    def write_tunnelled(self, data: bytes) -> None:
        """Pass on bytes of the machine."""

    def pause_reading(self) -> None:
        """Stop reading what the machine is to get until `resume_reading`."""

    def resume_reading(self) -> None:
        """Go on reading what the machine is to get."""

    def end_tunnel(self) -> None:
        """The machine's side has ended."""

    def handle_deadline(self) -> None:
        """Nothing went through the tunnel for too long."""


class Seeker(Protocol):
    """Who waits for a connection to a machine: an exchange, or another node's session."""

    def reach_timeout_s(self) -> float:
        """Return how long the connection may take."""

    def announcement(self) -> bytes:
        """Return the PROXY header that a new connection begins with; empty: none."""

    def handle_connected(self, machine: Any) -> None:
        """The connection is there."""

    def handle_connect_failed(self, code: str, detail: str) -> None:
        """The connection could not be made."""

    def handle_shortage(self, code: str, detail: str) -> None:
        """The connection could not be made, and the machine is not to blame."""


class Reaching(Seeker, Protocol):
    """An exchange, or a raw connection."""

    service: Service


class Connector(Protocol):
    """Where connections to machines come from."""

    def acquire(self, target: Target, port: int, exchange: Exchange, *, fresh: bool) -> Machine | None:
        """Return an idle connection, or None and later call `handle_connected` or `handle_connect_failed`.

        `fresh` asks for a new connection. Never calls back before it returns.
        """

    def connect(self, target: Target, port: int, session: Reaching, make: Callable[[], Any]) -> None:
        """Make a connection for this session alone, as `acquire` does; `make` makes its protocol."""


class Gate(Protocol):
    """Who may connect."""

    def name(self, address: str) -> str:
        """Return what a client is counted under; empty for a trusted proxy."""

    def arrives(self, client: str, now: float, *, secure: bool) -> bool:
        """Count a connection that this client opens; False when it opens too many a second."""

    def admit(self, client: str) -> str | None:
        """Count a connection of this client, or return the reason why it must not be."""

    def leave(self, client: str) -> None:
        """Forget an admitted connection."""

    def tells(self) -> bool:
        """True while a client that is turned away can be told so."""


class Journal(Protocol):
    """The access log."""

    def samples(self) -> bool:
        """Count a request; True when it is one that is logged."""

    def add(self, entry: Entry) -> None:
        """Log a request."""


class SpanSink(Protocol):
    """The tracer."""

    ids: TraceIds
    believes_clients: bool

    def add_spans(self, spans: list[Span]) -> None:
        """Take the spans of one exchange."""


class Chooser(Protocol):
    """The balancer."""

    def choose(
        self, service: Service, now: float, want: Want = ANYWHERE, tried: tuple[str, ...] = ()
    ) -> Target | Refusal:
        """Return the machine to send a request to, or why there is none."""


class Starter(Protocol):
    """Who has machines started."""

    def start(self, machine: Target) -> bool:
        """Ask its owner to start a machine, however often; False when nobody can be asked."""


class Plane:
    """What all exchanges of a worker share.

    No dataclass: mypyc makes one crash whose annotations are not imported for real.
    """

    __slots__ = (
        "access_log",
        "admission",
        "balancer",
        "body_kept_max",
        "connector",
        "draining",
        "explain_keys",
        "metrics",
        "now",
        "queue",
        "replay_cache",
        "request_ids",
        "retries",
        "settings",
        "shedding",
        "starter",
        "table",
        "tracer",
        "wall_us",
    )

    def __init__(
        self,
        *,
        settings: ProxySettings,
        table: RoutingTable,
        balancer: Chooser,
        metrics: ProxyMetrics,
        connector: Connector,
        queue: Queue,
        request_ids: RequestIds,
        now: Callable[[], float],
        wall_us: Callable[[], int],
        admission: Gate,
        body_kept_max: int,
        access_log: Journal | None = None,
        starter: Starter | None = None,
        tracer: SpanSink | None = None,
    ) -> None:
        self.settings = settings
        self.table = table
        self.balancer = balancer
        self.metrics = metrics
        self.connector = connector
        self.queue = queue
        self.request_ids = request_ids
        self.now = now  # monotonic seconds
        self.wall_us = wall_us  # microseconds since the epoch
        self.admission = admission
        self.body_kept_max = body_kept_max  # bytes kept for replays; 0 while memory is short
        self.access_log = access_log
        self.starter = starter
        self.tracer = tracer
        self.replay_cache = ReplayCache(settings.replay_cache_entries_max, metrics)
        self.retries = RetryBudgets(settings, metrics, now())
        self.explain_keys: tuple[bytes, ...] = ()  # of those whose requests are explained to them
        self.draining = False  # set once, when the worker is told to stop
        self.shedding = False  # while memory is so short that requests are refused

    def compute_wait_s(self, choice: Refusal) -> float:
        """Return how long to wait for room, or for a machine to start, which is asked for; 0: in vain."""
        if choice.at_limit:
            return self.settings.queue_timeout_s
        if choice.asleep is not None and self.starter is not None and self.starter.start(choice.asleep):
            return self.settings.start_timeout_s
        return 0.0
