"""What the data plane counts.

Decides names, labels and buckets; refuses to know how they are shown. Invariant: every sample but
the gauges only grows, and all may be added up over workers. Labels come from the routing table and
from our own code tables, never from clients, and there are no more of them than the bounds below.

A request finds its counters by two look-ups and adds to them; texts are made when samples are taken. A
histogram is one sample with all its numbers until it is shown: the samples of a worker travel to the agent
every second.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from routing.target import Target

    from .core.compression import Encoder

Labels = tuple[tuple[str, str], ...]
# The value of a histogram is the count of each bucket alone, with that above the last bound, then the sum.
Sample = tuple[str, Labels, float | tuple[float, ...]]

# Machines and apps that a worker has sent to, beyond which all others are counted together. Each takes some
# 8 us a second in the worker.
MACHINES_MAX: Final = 500
APPS_MAX: Final = 1_000
# In place of their names: no name in the table has parentheses.
OTHER: Final = "(other)"

# Seconds. From what a hop within a machine takes to the default response timeout.
DURATION_BUCKETS_S: Final[tuple[float, ...]] = (
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
    "isthmus_request_bytes_total": ("counter", "Bytes of request bodies that clients sent, by app."),
    "isthmus_response_bytes_total": ("counter", "Bytes of answers' bodies that went to clients, by app."),
    "isthmus_machine_requests_total": (
        "counter",
        "Requests that ended at a machine, by app, region, machine and class of status.",
    ),
    "isthmus_machine_request_duration_seconds": ("histogram", "The same of those that ended at a machine."),
    "isthmus_machine_request_bytes_total": ("counter", "Bytes of bodies of those requests."),
    "isthmus_machine_response_bytes_total": ("counter", "Bytes of bodies of those answers."),
    "isthmus_machine_requests_in_flight": ("gauge", "Requests that a machine has of this node."),
    "isthmus_machine_connections_total": ("counter", "Connections opened, by machine."),
    "isthmus_machine_failures_total": (
        "counter",
        "Connections that failed and answers that never came, by machine.",
    ),
    "isthmus_machine_replays_total": ("counter", "Requests sent elsewhere because the machine said so."),
    "isthmus_requests_in_flight": ("gauge", "Requests that are being served."),
    "isthmus_requests_queued": ("gauge", "Requests that wait because all machines are at their hard limit."),
    "isthmus_queue_waits_total": ("counter", "Requests that had to wait for a machine."),
    "isthmus_queue_wait_seconds_total": ("counter", "How long they waited, in total."),
    "isthmus_errors_total": (
        "counter",
        "Answers made by the proxy itself, by code, and by app where one is known.",
    ),
    "isthmus_shed_total": ("counter", "Connections and requests refused, by what was short."),
    "isthmus_access_log_dropped_total": ("counter", "Lines of the access log that could not be written."),
    "isthmus_compressing": ("gauge", "Answers that are being compressed."),
    "isthmus_compression_bytes_in_total": ("counter", "Bytes of compressed answers before, by coding."),
    "isthmus_compression_bytes_out_total": ("counter", "Bytes of compressed answers after, by coding."),
    "isthmus_trace_spans_sent_total": ("counter", "Spans that the collector took."),
    "isthmus_trace_spans_dropped_total": (
        "counter",
        "Spans that the collector did not take in time.",
    ),
    "isthmus_aborted_total": ("counter", "Exchanges cut before their end, by who cut them."),
    "isthmus_replays_total": (
        "counter",
        "Requests sent again because an app asked for it, by app that asked.",
    ),
    "isthmus_replay_cache_entries": ("gauge", "Replays that are remembered."),
    "isthmus_replay_cache_total": ("counter", "What became of remembered replays, by app and outcome."),
    "isthmus_retries_refused_total": ("counter", "Retries not made because an app had too many, by app."),
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
    "isthmus_tcp_connections_total": ("counter", "Raw connections that reached a machine."),
    "isthmus_tcp_connections_open": ("gauge", "Raw connections open, by machine."),
    "isthmus_tcp_received_bytes_total": (
        "counter",
        "Bytes that clients sent on raw connections.",
    ),
    "isthmus_tcp_sent_bytes_total": ("counter", "Bytes that machines sent on raw connections."),
}


class Tally:
    """What is counted alike for an app and for a machine."""

    __slots__ = ("buckets", "bytes_in", "bytes_out", "replays", "seconds", "statuses")

    def __init__(self) -> None:
        self.statuses = [0] * 6  # by first digit
        self.buckets = [0] * (len(DURATION_BUCKETS_S) + 1)
        self.seconds = 0.0
        self.bytes_in = 0
        self.bytes_out = 0
        self.replays = 0  # asked for

    def record(self, status: int, bucket: int, seconds: float, bytes_in: int, bytes_out: int) -> None:
        """Count one finished request whose duration falls into that bucket."""
        self.statuses[status // 100] += 1
        self.buckets[bucket] += 1
        self.seconds += seconds
        self.bytes_in += bytes_in
        self.bytes_out += bytes_out

    def samples(self, prefix: str, labels: Labels) -> list[Sample]:
        """Return what was counted under names with this prefix."""
        samples: list[Sample] = [
            (f"{prefix}requests_total", (*labels, ("status", f"{first}xx")), count)
            for first, count in enumerate(self.statuses)
            if count
        ]
        samples.append((f"{prefix}request_duration_seconds", labels, (*self.buckets, self.seconds)))
        samples.append((f"{prefix}request_bytes_total", labels, self.bytes_in))
        samples.append((f"{prefix}response_bytes_total", labels, self.bytes_out))
        samples.append((f"{prefix}replays_total", labels, self.replays))
        return samples


class AppMetrics(Tally):
    """The counters of one app."""

    __slots__ = ("cached", "errors", "retries", "retries_refused")

    def __init__(self) -> None:
        super().__init__()
        self.retries = 0
        self.retries_refused = 0
        self.errors: dict[str, int] = {}  # by code
        self.cached: dict[str, int] = {}  # remembered replays, by what became of them

    def count_cached(self, outcome: str) -> None:
        """Count one use of the replay cache."""
        self.cached[outcome] = self.cached.get(outcome, 0) + 1


class MachineMetrics(Tally):
    """The counters of one machine, or of all that are counted together."""

    __slots__ = (
        "connections",
        "failures",
        "target",
        "tcp_bytes_in",
        "tcp_bytes_out",
        "tcp_connections",
        "tcp_open",
    )

    def __init__(self, target: Target | None) -> None:
        super().__init__()
        self.target = target
        self.connections = 0
        self.failures = 0
        # Of raw connections.
        self.tcp_connections = 0
        self.tcp_open = 0
        self.tcp_bytes_in = 0
        self.tcp_bytes_out = 0


class ProxyMetrics:
    """The counters of one worker."""

    __slots__ = (
        "aborted",
        "apps",
        "bad_announcements",
        "compressed",
        "compressing",
        "connect_failures",
        "connections",
        "connections_open",
        "errors",
        "in_flight",
        "log_lines_dropped",
        "machines",
        "other_machines",
        "queue_seconds",
        "queue_waits",
        "queued",
        "replay_cache_entries",
        "shed",
        "spans_dropped",
        "spans_sent",
        "tunnels",
        "upstreams",
        "upstreams_open",
    )

    def __init__(self) -> None:
        self.apps: dict[str, AppMetrics] = {}
        self.machines: dict[str, MachineMetrics] = {}
        self.other_machines: dict[str, MachineMetrics] = {}  # beyond the bound, by region
        self.errors: dict[str, int] = {}  # of requests that led to no app
        self.connect_failures: dict[str, int] = {}
        self.aborted = {"client": 0, "machine": 0}
        self.shed: dict[str, int] = {}
        self.log_lines_dropped = 0
        self.spans_sent = 0
        self.spans_dropped = 0
        self.bad_announcements = 0
        self.compressing = 0
        self.compressed: dict[str, tuple[int, int]] = {}  # bytes before and after, by coding
        self.in_flight = 0
        self.queued = 0
        self.queue_waits = 0
        self.queue_seconds = 0.0
        self.replay_cache_entries = 0
        self.connections = 0
        self.connections_open = 0
        self.upstreams = 0
        self.upstreams_open = 0
        self.tunnels = 0

    def app(self, name: str) -> AppMetrics:
        """Return the counters of an app; the name must come from the routing table."""
        app = self.apps.get(name)
        if app is None:
            if len(self.apps) >= APPS_MAX and name != OTHER:
                return self.app(OTHER)
            app = self.apps[name] = AppMetrics()
        return app

    def forget_apps(self, exists: Callable[[str], bool]) -> None:
        """Make room, when there is none left, where apps are that exist no longer."""
        if len(self.apps) >= APPS_MAX:
            for name in [name for name in self.apps if name != OTHER and not exists(name)]:
                del self.apps[name]

    def machine(self, target: Target) -> MachineMetrics:
        """Return the counters of a machine."""
        machine = self.machines.get(target.id)
        if machine is None or machine.target is not target:
            return self._meet(target)
        return machine

    def _meet(self, target: Target) -> MachineMetrics:
        if len(self.machines) < MACHINES_MAX or target.id in self.machines:
            machine = self.machines[target.id] = MachineMetrics(target)
            return machine
        other = self.other_machines.get(target.region)
        if other is None:
            other = self.other_machines[target.region] = MachineMetrics(None)
        return other

    def record(
        self, app: str, target: Target | None, status: int, seconds: float, bytes_in: int, bytes_out: int
    ) -> None:
        """Count one finished request, and the machine at which it ended, if there was one."""
        bucket = bisect_left(DURATION_BUCKETS_S, seconds)
        self.app(app).record(status, bucket, seconds, bytes_in, bytes_out)
        if target is not None:
            self.machine(target).record(status, bucket, seconds, bytes_in, bytes_out)

    def count_error(self, code: str, app: str = "") -> None:
        """Count one answer of the proxy's own, and to which app's request if there was one."""
        errors = self.app(app).errors if app else self.errors
        errors[code] = errors.get(code, 0) + 1

    def count_connect_failure(self, code: str) -> None:
        """Count one connection to a machine that could not be made."""
        self.connect_failures[code] = self.connect_failures.get(code, 0) + 1

    def count_shed(self, reason: str) -> None:
        """Count one connection or request that was refused."""
        self.shed[reason] = self.shed.get(reason, 0) + 1

    def end_compression(self, encoder: Encoder) -> None:
        """Count an answer that was compressed."""
        self.compressing -= 1
        before, after = self.compressed.get(encoder.coding, (0, 0))
        self.compressed[encoder.coding] = before + encoder.bytes_in, after + encoder.bytes_out

    def samples(self) -> list[Sample]:
        """Return all of it as (name, labels, value)."""
        samples: list[Sample] = [
            ("isthmus_requests_in_flight", (), self.in_flight),
            ("isthmus_requests_queued", (), self.queued),
            ("isthmus_compressing", (), self.compressing),
            ("isthmus_bad_announcements_total", (), self.bad_announcements),
            ("isthmus_access_log_dropped_total", (), self.log_lines_dropped),
            ("isthmus_trace_spans_sent_total", (), self.spans_sent),
            ("isthmus_trace_spans_dropped_total", (), self.spans_dropped),
            ("isthmus_queue_waits_total", (), self.queue_waits),
            ("isthmus_queue_wait_seconds_total", (), self.queue_seconds),
            ("isthmus_replay_cache_entries", (), self.replay_cache_entries),
            ("isthmus_connections_total", (), self.connections),
            ("isthmus_connections_open", (), self.connections_open),
            ("isthmus_upstream_connections_total", (), self.upstreams),
            ("isthmus_upstream_connections_open", (), self.upstreams_open),
            ("isthmus_tunnels_total", (), self.tunnels),
        ]
        for coding, (before, after) in self.compressed.items():
            samples.append(("isthmus_compression_bytes_in_total", (("coding", coding),), before))
            samples.append(("isthmus_compression_bytes_out_total", (("coding", coding),), after))
        for who, count in self.aborted.items():
            samples.append(("isthmus_aborted_total", (("by", who),), count))
        for reason, count in self.shed.items():
            samples.append(("isthmus_shed_total", (("reason", reason),), count))
        for code, count in self.errors.items():
            samples.append(("isthmus_errors_total", (("code", code),), count))
        for code, count in self.connect_failures.items():
            samples.append(("isthmus_upstream_connect_failures_total", (("code", code),), count))
        for name, app in self.apps.items():
            labels = (("app", name),)
            samples += app.samples("isthmus_", labels)
            samples.append(("isthmus_retries_total", labels, app.retries))
            samples.append(("isthmus_retries_refused_total", labels, app.retries_refused))
            for outcome, count in app.cached.items():
                samples.append(("isthmus_replay_cache_total", (*labels, ("outcome", outcome)), count))
            for code, count in app.errors.items():
                samples.append(("isthmus_errors_total", (*labels, ("code", code)), count))
        for machine in self.machines.values():
            if machine.target is not None:
                target = machine.target
                samples += _machine_samples(machine, target.app, target.id, target.region)
        for region, machine in self.other_machines.items():
            samples += _machine_samples(machine, OTHER, OTHER, region)
        self._forget_removed()
        return samples

    def _forget_removed(self) -> None:
        """Make room for other machines; what was counted of these was just told."""
        for name in [name for name, m in self.machines.items() if m.target is not None and m.target.removed]:
            del self.machines[name]


def _machine_samples(machine: MachineMetrics, app: str, name: str, region: str) -> list[Sample]:
    labels = (("app", app), ("machine", name), ("region", region))
    samples = machine.samples("isthmus_machine_", labels)
    samples.append(("isthmus_machine_connections_total", labels, machine.connections))
    samples.append(("isthmus_machine_failures_total", labels, machine.failures))
    if machine.tcp_connections:
        samples += [
            ("isthmus_tcp_connections_total", labels, machine.tcp_connections),
            ("isthmus_tcp_connections_open", labels, machine.tcp_open),
            ("isthmus_tcp_received_bytes_total", labels, machine.tcp_bytes_in),
            ("isthmus_tcp_sent_bytes_total", labels, machine.tcp_bytes_out),
        ]
    if machine.target is not None:
        samples.append(("isthmus_machine_requests_in_flight", labels, machine.target.in_flight))
    return samples


def unfold(sample: Sample) -> list[tuple[str, Labels, float]]:
    """Return a sample as Prometheus has it: a histogram becomes many, any other one stays."""
    name, labels, value = sample
    if not isinstance(value, tuple):
        return [(name, labels, value)]
    shown: list[tuple[str, Labels, float]] = []
    total = 0.0
    for bound, count in zip((*map(repr, DURATION_BUCKETS_S), "+Inf"), value[:-1], strict=True):
        total += count
        shown.append((f"{name}_bucket", (*labels, ("le", bound)), total))
    shown.append((f"{name}_sum", labels, value[-1]))
    shown.append((f"{name}_count", labels, total))
    return shown
