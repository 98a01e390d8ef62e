"""What the data plane counts.

Decides names, labels and buckets; refuses to know how they are shown. Invariant: every sample but
the gauges only grows, and all may be added up over workers. Labels come from the routing table and
from our own code tables, never from clients.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

Sample = tuple[str, tuple[tuple[str, str], ...], float]

# Seconds. From what a hop within a machine takes to the default response timeout.
DURATION_BUCKETS_S: Final = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    60.0,
)

METRICS: Final[dict[str, tuple[str, str]]] = {
    "isthmus_requests_total": ("counter", "Requests answered, by app and class of status."),
    "isthmus_request_duration_seconds": ("histogram", "From the head of a request to the end of its answer."),
    "isthmus_requests_in_flight": ("gauge", "Requests that are being served."),
    "isthmus_requests_queued": ("gauge", "Requests that wait because all machines are at their hard limit."),
    "isthmus_queue_waits_total": ("counter", "Requests that had to wait for a machine."),
    "isthmus_queue_wait_seconds_total": ("counter", "How long they waited, in total."),
    "isthmus_errors_total": ("counter", "Answers made by the proxy itself, by code."),
    "isthmus_shed_total": ("counter", "Connections and requests refused, by what was short."),
    "isthmus_access_log_dropped_total": ("counter", "Lines of the access log that could not be written."),
    "isthmus_aborted_total": ("counter", "Exchanges cut before their end, by who cut them."),
    "isthmus_replays_total": (
        "counter",
        "Requests sent again because an app asked for it, by app that asked.",
    ),
    "isthmus_retries_total": ("counter", "Requests sent again after a failure, by app."),
    "isthmus_bad_announcements_total": (
        "counter",
        "Connections cut because their PROXY header was malformed or late.",
    ),
    "isthmus_connections_total": ("counter", "Client connections accepted."),
    "isthmus_connections_open": ("gauge", "Client connections open."),
    "isthmus_upstream_connections_total": ("counter", "Connections to machines opened."),
    "isthmus_upstream_connect_failures_total": ("counter", "Connections to machines that failed, by code."),
    "isthmus_upstream_connections_open": ("gauge", "Connections to machines open."),
    "isthmus_tunnels_total": ("counter", "Connections upgraded to another protocol."),
}


class AppMetrics:
    """The counters of one app."""

    __slots__ = ("buckets", "replays", "retries", "seconds", "statuses")

    def __init__(self) -> None:
        self.statuses = [0] * 6  # by first digit
        self.buckets = [0] * (len(DURATION_BUCKETS_S) + 1)
        self.seconds = 0.0
        self.replays = 0
        self.retries = 0

    def record(self, status: int, seconds: float) -> None:
        """Count one finished request."""
        self.statuses[status // 100] += 1
        self.buckets[bisect_left(DURATION_BUCKETS_S, seconds)] += 1
        self.seconds += seconds


class ProxyMetrics:
    """The counters of one worker."""

    __slots__ = (
        "aborted",
        "apps",
        "bad_announcements",
        "connect_failures",
        "connections",
        "connections_open",
        "errors",
        "in_flight",
        "log_lines_dropped",
        "queue_seconds",
        "queue_waits",
        "queued",
        "shed",
        "tunnels",
        "upstreams",
        "upstreams_open",
    )

    def __init__(self) -> None:
        self.apps: dict[str, AppMetrics] = {}
        self.errors: dict[str, int] = {}
        self.connect_failures: dict[str, int] = {}
        self.aborted = {"client": 0, "machine": 0}
        self.shed: dict[str, int] = {}
        self.log_lines_dropped = 0
        self.bad_announcements = 0
        self.in_flight = 0
        self.queued = 0
        self.queue_waits = 0
        self.queue_seconds = 0.0
        self.connections = 0
        self.connections_open = 0
        self.upstreams = 0
        self.upstreams_open = 0
        self.tunnels = 0

    def app(self, name: str) -> AppMetrics:
        """Return the counters of an app; the name must come from the routing table."""
        app = self.apps.get(name)
        if app is None:
            app = self.apps[name] = AppMetrics()
        return app

    def count_error(self, code: str) -> None:
        """Count one answer of the proxy's own."""
        self.errors[code] = self.errors.get(code, 0) + 1

    def count_connect_failure(self, code: str) -> None:
        """Count one connection to a machine that could not be made."""
        self.connect_failures[code] = self.connect_failures.get(code, 0) + 1

    def count_shed(self, reason: str) -> None:
        """Count one connection or request that was refused."""
        self.shed[reason] = self.shed.get(reason, 0) + 1

    def samples(self) -> list[Sample]:
        """Return all of it as (name, labels, value)."""
        samples: list[Sample] = [
            ("isthmus_requests_in_flight", (), self.in_flight),
            ("isthmus_requests_queued", (), self.queued),
            ("isthmus_bad_announcements_total", (), self.bad_announcements),
            ("isthmus_access_log_dropped_total", (), self.log_lines_dropped),
            ("isthmus_queue_waits_total", (), self.queue_waits),
            ("isthmus_queue_wait_seconds_total", (), self.queue_seconds),
            ("isthmus_connections_total", (), self.connections),
            ("isthmus_connections_open", (), self.connections_open),
            ("isthmus_upstream_connections_total", (), self.upstreams),
            ("isthmus_upstream_connections_open", (), self.upstreams_open),
            ("isthmus_tunnels_total", (), self.tunnels),
        ]
        for who, count in self.aborted.items():
            samples.append(("isthmus_aborted_total", (("by", who),), count))
        for reason, count in self.shed.items():
            samples.append(("isthmus_shed_total", (("reason", reason),), count))
        for code, count in self.errors.items():
            samples.append(("isthmus_errors_total", (("code", code),), count))
        for code, count in self.connect_failures.items():
            samples.append(("isthmus_upstream_connect_failures_total", (("code", code),), count))
        for name, app in self.apps.items():
            samples += _app_samples(name, app)
        return samples


def _app_samples(name: str, app: AppMetrics) -> list[Sample]:
    label = ("app", name)
    samples: list[Sample] = [
        ("isthmus_requests_total", (label, ("status", f"{first}xx")), count)
        for first, count in enumerate(app.statuses)
        if count
    ]
    samples.append(("isthmus_replays_total", (label,), app.replays))
    samples.append(("isthmus_retries_total", (label,), app.retries))
    total = 0
    for bound, count in zip((*DURATION_BUCKETS_S, float("inf")), app.buckets, strict=True):
        total += count
        shown = "+Inf" if bound == float("inf") else repr(bound)
        samples.append(("isthmus_request_duration_seconds_bucket", (label, ("le", shown)), total))
    samples.append(("isthmus_request_duration_seconds_sum", (label,), app.seconds))
    samples.append(("isthmus_request_duration_seconds_count", (label,), total))
    return samples
