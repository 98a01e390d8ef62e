"""Turn the plain samples of workers, agent and checks into Prometheus text.

Decides the form only: what is counted, and its help text, belongs to the part that counts. Invariant: sums
over workers never go down when a worker is restarted, because what a dead one had counted is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

import proxy.metrics
import proxy.peer_metrics
import proxy.tls_metrics
import replication.metrics
import replication.subscriptions
from isthmus import credentials
from isthmus.checking import checker
from isthmus.deploys import conductor
from isthmus.machines import wiring
from isthmus.rollouts import keeper as rollouts
from isthmus.staging import keeper
from proxy.metrics import unfold

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from proxy.metrics import Sample as WorkerSample
    from replication.metrics import Sample

Key = tuple[str, tuple[tuple[str, str], ...]]
Value: TypeAlias = float | tuple[float, ...]

OWN_METRICS: Mapping[str, tuple[str, str]] = {
    "isthmus_config_reload_failed": ("gauge", "1 when the last reload was refused; the last good one stays"),
    "isthmus_feed_connected": ("gauge", "Workers that follow the agent's change feed"),
    "isthmus_feed_followers": ("gauge", "Followers as the agent counts them"),
    "isthmus_loads_rows_written_total": ("counter", "Rows of the table of loads that this node wrote"),
    "isthmus_machines_ejected": ("gauge", "Machines that workers leave out after failures, once for each"),
    "isthmus_routing_rows_rejected": ("gauge", "Rows of the table that workers could not use"),
}


def known_metrics() -> dict[str, tuple[str, str]]:
    """Return (type, help) of every metric by name."""
    return {
        **proxy.metrics.METRICS,
        **proxy.peer_metrics.METRICS,
        **proxy.tls_metrics.METRICS,
        **replication.metrics.METRICS,
        **replication.subscriptions.METRICS,
        **checker.METRICS,
        **wiring.METRICS,
        **keeper.METRICS,
        **rollouts.METRICS,
        **conductor.METRICS,
        **credentials.METRICS,
        **OWN_METRICS,
    }


def find_family(name: str, known: Mapping[str, tuple[str, str]]) -> str | None:
    """Return the metric that a sample belongs to, which for the parts of a histogram has a shorter name."""
    if name in known:
        return name
    stem, _, part = name.rpartition("_")
    is_part = part in ("bucket", "sum", "count") and known.get(stem, ("", ""))[0] == "histogram"
    return stem if is_part else None


# Workers that are gone and counted one by one, since they may be back; all earlier ones are one.
GONE_MAX = 16
_EARLIER = "earlier"


class WorkerTotals:
    """What all workers have counted since the node started.

    `_latest` holds the newest samples of each worker; `_gone` the counters of those that are gone.
    `on_counted` is given the latter when they change, for the totals of the next agent.
    """

    def __init__(
        self,
        counted: Mapping[str, Iterable[Any]] | None = None,
        on_counted: Callable[[dict[str, list[Any]]], None] = lambda _: None,
    ) -> None:
        self._latest: dict[str, dict[Key, Value]] = {}
        self._gone: dict[str, dict[Key, Value]] = {}
        self._types = known_metrics()
        self._on_counted = on_counted
        for worker, samples in (counted or {}).items():
            self._gone[worker] = {
                (name, tuple(map(tuple, labels))): _thaw(value) for name, labels, value in samples
            }

    def handle_samples(self, worker: str, samples: Iterable[WorkerSample]) -> None:
        """Take the newest samples of a worker; `worker` names one life of one process."""
        self._gone.pop(worker, None)
        self._latest[worker] = {(name, labels): value for name, labels, value in samples}

    def handle_gone(self, worker: str) -> None:
        """Keep the counters of a worker that no longer follows; it may be back, and counts on then."""
        samples = self._latest.pop(worker, {})
        self._gone[worker] = {key: value for key, value in samples.items() if not self._is_gauge(key[0])}
        self._tell()

    def handle_end(self) -> None:
        """Leave what all workers have counted to the next agent: they may be gone before it is there."""
        for worker in list(self._latest):
            self.handle_gone(worker)

    def _tell(self) -> None:
        while len(self._gone) > GONE_MAX:
            earlier = self._gone.pop(_EARLIER, {})
            for key, value in self._gone.pop(next(iter(self._gone))).items():
                earlier[key] = _add(earlier.get(key), value)
            self._gone[_EARLIER] = earlier
        self._on_counted(
            {
                name: [[*key, value] for key, value in counters.items()]
                for name, counters in self._gone.items()
            }
        )

    def samples(self) -> Iterator[Sample]:
        """Return the sums over all workers."""
        totals: dict[Key, Value] = {}
        for samples in (*self._gone.values(), *self._latest.values()):
            for key, value in samples.items():
                totals[key] = _add(totals.get(key), value)
        for (name, labels), value in totals.items():
            yield from unfold((name, labels, value))

    def traffic(self) -> dict[str, Any]:
        """Return what was answered so far, by app, and what led to no app: rates are made of two of these."""
        apps: dict[str, dict[str, float]] = {}
        traffic: dict[str, Any] = {"in_flight": 0, "unrouted": 0, "apps": apps}
        for samples in (*self._gone.values(), *self._latest.values()):
            for (name, labels), value in samples.items():
                if isinstance(value, tuple):
                    continue
                if name == "isthmus_requests_in_flight":
                    traffic["in_flight"] += value
                elif name == "isthmus_errors_total" and len(labels) == 1:  # a code, and no app
                    traffic["unrouted"] += value
                elif name == "isthmus_requests_total":
                    said = dict(labels)
                    app = apps.setdefault(said["app"], {"requests": 0, "errors": 0})
                    app["requests"] += value
                    app["errors"] += value if said["status"] == "5xx" else 0
        return traffic

    def _is_gauge(self, name: str) -> bool:
        family = find_family(name, self._types)
        return family is None or self._types[family][0] == "gauge"


def _thaw(value: Any) -> Value:
    """Return a value that has come by JSON, which has no tuples."""
    return tuple(value) if isinstance(value, list) else value


def _add(one: Value | None, other: Value) -> Value:
    """Return the sum; a histogram is only added to one of the same form."""
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return tuple(a + b for a, b in zip(one, other, strict=True))
    if isinstance(one, tuple) or isinstance(other, tuple) or one is None:
        return other
    return one + other


def expose(samples: Iterable[Sample]) -> tuple[bytes, str]:
    """Return Prometheus text and its content type. A sample without an entry in the tables is an error."""
    registry = CollectorRegistry()
    registry.register(_Samples(samples))
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


class _Samples:
    """A prometheus_client collector over samples that were taken already."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Metric]:
        known = known_metrics()
        families: dict[str, Metric] = {}
        for name, labels, value in self._samples:
            family = find_family(name, known)
            if family is None:
                raise KeyError(f"no table describes the metric {name}")
            kind, text = known[family]
            # prometheus_client adds `_total` to a counter's samples itself.
            metric = families.setdefault(family, Metric(family.removesuffix("_total"), text, kind))
            metric.add_sample(name, dict(labels), value)
        yield from families.values()
