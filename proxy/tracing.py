"""Spans on their way to a collector: OTLP over HTTP, in JSON.

Decides when spans are sent, how often that is tried, and which are dropped. Refuses to know what is in them.
Invariant: traffic never waits for the collector. A thread sends, many spans at a time; when the collector
cannot keep up they are dropped and counted.

OpenTelemetry's own SDK and exporter would take 8 MB more in each worker, for a queue and a request.
"""

from __future__ import annotations

import http.client
import logging
import queue
import random
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import orjson

from .core.otlp import encode_spans
from .core.trace_context import TraceIds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .core.traced_exchange import Span
    from .metrics import ProxyMetrics

# A request of some 200 KB; and what waits for a slow collector is at most 32 of them.
_BATCH_SPANS: Final = 256
_WAITING_MAX: Final = 32
# The collector's answer; what it says besides the status is of no use here.
_ANSWER_BYTES_MAX: Final = 65_536
_TIMEOUT_S: Final = 10.0
# OTLP/HTTP, "retryable response codes"; any other one will be the same next time.
_PASSING: Final = frozenset((429, 502, 503, 504))
_PAUSES_S: Final = (0.5, 2.0, 8.0)
_PATH: Final = "/v1/traces"

_END: Final[list[Span]] = []

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TracingSettings:
    """Where spans go, which ones, and what is said of the one who sends them."""

    endpoint: str  # of the collector: http://host:4318, with a path if it is not the usual one
    ratio: float = 1.0  # of the traces that begin here
    believe_clients: bool = True  # whether a client's `traceparent` is continued, recorded or not as it says
    headers: Mapping[str, str] = field(default_factory=dict)  # of each request to the collector
    resource: Mapping[str, str | int] = field(default_factory=dict)


class Tracer:
    """Sends from its creation until `close`."""

    # For the sweeper: always due.
    deadline = 0.0

    def __init__(self, settings: TracingSettings, metrics: ProxyMetrics) -> None:
        self.ids = TraceIds(random.SystemRandom().getrandbits, settings.ratio)
        self.believes_clients = settings.believe_clients
        self._settings = settings
        self._metrics = metrics
        self._spans: list[Span] = []
        self._batches: queue.Queue[list[Span]] = queue.Queue(_WAITING_MAX)
        self._closing = threading.Event()
        self._failing = False  # said in the log already
        self._connection: http.client.HTTPConnection | None = None
        self._thread = threading.Thread(target=self._send_all, name="tracing", daemon=True)
        self._thread.start()

    def add_spans(self, spans: list[Span]) -> None:
        """Take the spans of one exchange."""
        self._spans += spans
        if len(self._spans) >= _BATCH_SPANS:
            self.handle_deadline()

    def handle_deadline(self) -> None:
        """Hand over what is here."""
        if self._spans:
            try:
                self._batches.put_nowait(self._spans)
            except queue.Full:
                self._metrics.spans_dropped += len(self._spans)
            self._spans = []

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is here, as far as that takes no longer than the timeout."""
        self.handle_deadline()
        self._closing.set()
        try:
            self._batches.put(_END, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    # In the thread

    def _send_all(self) -> None:
        while (spans := self._batches.get()) is not _END:
            try:
                self._send(spans)
            except Exception:  # a span that cannot be encoded must not end tracing
                self._metrics.spans_dropped += len(spans)
                log.exception("tracing: spans could not be sent")
        self._disconnect()

    def _send(self, spans: list[Span]) -> None:
        body = orjson.dumps(encode_spans(spans, self._settings.resource))
        for pause_s in (*_PAUSES_S, 0.0):
            problem, passes = self._post(body)
            if not problem:
                self._metrics.spans_sent += len(spans)
                self._failing = False
                return
            if not self._failing:
                self._failing = True
                log.warning("tracing: %s: %s", self._settings.endpoint, problem)
            if not passes or self._closing.is_set():
                break
            self._closing.wait(pause_s * random.uniform(0.5, 1.0))
        self._metrics.spans_dropped += len(spans)

    def _post(self, body: bytes) -> tuple[str, bool]:
        """Return what went wrong, if anything, and whether that may pass."""
        url = urlsplit(self._settings.endpoint)
        if self._connection is None:
            kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
            self._connection = kind(url.hostname or "", url.port, timeout=_TIMEOUT_S)
        headers = {"Content-Type": "application/json", **self._settings.headers}
        try:
            self._connection.request("POST", url.path if url.path.strip("/") else _PATH, body, headers)
            answer = self._connection.getresponse()
            if len(answer.read(_ANSWER_BYTES_MAX)) == _ANSWER_BYTES_MAX or answer.will_close:
                self._disconnect()
        except (OSError, http.client.HTTPException) as error:
            self._disconnect()
            return str(error) or type(error).__name__, True
        if answer.status // 100 == 2:
            return "", False
        return f"the collector answered {answer.status} {answer.reason}", answer.status in _PASSING

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
