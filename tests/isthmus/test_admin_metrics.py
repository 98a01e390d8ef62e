from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import proxy.metrics
import proxy.peer_metrics
import proxy.tls_metrics
import replication.metrics
import replication.subscriptions
from isthmus import credentials
from isthmus.admin.metrics import GONE_MAX, OWN_METRICS, WorkerTotals, expose, known_metrics
from isthmus.checking import checker
from isthmus.deploys import conductor
from isthmus.machines import wiring
from isthmus.rollouts import keeper as rollouts
from isthmus.staging import keeper
from proxy.metrics import ProxyMetrics

if TYPE_CHECKING:
    from replication.metrics import Sample

REQUESTS = "isthmus_requests_total"
IN_FLIGHT = "isthmus_requests_in_flight"


def totals_of(totals: WorkerTotals) -> dict[str, float]:
    return {name: value for name, _, value in totals.samples()}


def count(requests: float, in_flight: float = 0) -> list[Sample]:
    return [(REQUESTS, (), requests), (IN_FLIGHT, (), in_flight)]


def test_samples_of_workers_are_summed() -> None:
    totals = WorkerTotals()
    totals.handle_samples("worker-0/10", count(5, 1))
    totals.handle_samples("worker-1/11", count(7, 2))
    assert totals_of(totals) == {REQUESTS: 12, IN_FLIGHT: 3}


def test_traffic_is_what_rates_are_made_of() -> None:
    totals = WorkerTotals()
    for worker, path in (("worker-0/10", "/a"), ("worker-1/11", "/b")):
        metrics = ProxyMetrics()
        metrics.in_flight = 2
        for status in (200, 503, 404, 404):
            metrics.app("web").record(status, 0, 0.1, 1, 1)
        metrics.app("web").errors["no_candidate"] = 9
        metrics.app(path).record(200, 0, 0.1, 1, 1)
        metrics.count_error("no_route")
        totals.handle_samples(worker, metrics.samples())
    totals.handle_gone("worker-1/11")
    assert totals.traffic() == {
        "in_flight": 2,
        "unrouted": 2,
        "apps": {
            "web": {"requests": 8, "errors": 2},
            "/a": {"requests": 1, "errors": 0},
            "/b": {"requests": 1, "errors": 0},
        },
    }


def test_newer_samples_replace_older_ones_of_the_same_worker() -> None:
    totals = WorkerTotals()
    totals.handle_samples("worker-0/10", count(5, 1))
    totals.handle_samples("worker-0/10", count(6, 0))
    assert totals_of(totals) == {REQUESTS: 6, IN_FLIGHT: 0}


def test_restart_of_a_worker_keeps_its_counters_and_drops_its_gauges() -> None:
    totals = WorkerTotals()
    totals.handle_samples("worker-0/10", count(5, 3))
    totals.handle_samples("worker-1/11", count(100))
    totals.handle_gone("worker-0/10")
    totals.handle_samples("worker-0/12", count(1, 1))
    assert totals_of(totals) == {REQUESTS: 106, IN_FLIGHT: 1}
    totals.handle_gone("worker-0/12")
    totals.handle_samples("worker-0/13", count(2))
    assert totals_of(totals) == {REQUESTS: 108, IN_FLIGHT: 0}


def test_worker_that_is_back_is_not_counted_twice() -> None:
    totals = WorkerTotals()
    totals.handle_samples("worker-0/10", count(5, 3))
    totals.handle_gone("worker-0/10")
    assert totals_of(totals) == {REQUESTS: 5}
    totals.handle_samples("worker-0/10", count(6, 1))
    assert totals_of(totals) == {REQUESTS: 6, IN_FLIGHT: 1}


def test_next_agent_knows_what_workers_had_counted_that_are_gone() -> None:
    told: list[Any] = []
    totals = WorkerTotals(on_counted=told.append)
    for pid in range(3 * GONE_MAX):
        totals.handle_samples(f"worker-0/{pid}", [*count(1, 1), *served(0.002).samples()])
        totals.handle_gone(f"worker-0/{pid}")
    assert len(told[-1]) == GONE_MAX
    successor = WorkerTotals(json.loads(json.dumps(told[-1])))
    assert list(successor.samples()) == list(totals.samples())
    successor.handle_samples(f"worker-0/{pid}", count(3))
    successor.handle_samples("worker-0/new", count(1))
    counted = {(name, labels): value for name, labels, value in successor.samples()}
    assert counted[REQUESTS, ()] == 3 * GONE_MAX - 1 + 3 + 1
    # That of the one that is back is not here any more, as it reports none.
    assert counted["isthmus_request_duration_seconds_count", (("app", "web"),)] == 3 * GONE_MAX - 1


def test_labels_are_kept_apart() -> None:
    totals = WorkerTotals()
    totals.handle_samples("worker-0/1", [(REQUESTS, (("app", "a"),), 1.0), (REQUESTS, (("app", "b"),), 2.0)])
    totals.handle_samples("worker-0/2", [(REQUESTS, (("app", "a"),), 10.0)])
    found = {labels: value for _, labels, value in totals.samples()}
    assert found == {(("app", "a"),): 11.0, (("app", "b"),): 2.0}


def served(*seconds: float) -> ProxyMetrics:
    metrics = ProxyMetrics()
    for one in seconds:
        metrics.record("web", None, 200, one, 0, 0)
    return metrics


def test_restart_of_a_worker_keeps_its_histograms() -> None:
    totals = WorkerTotals()
    totals.handle_samples("worker-0/10", served(0.002, 2.0).samples())
    before = {(name, labels): value for name, labels, value in totals.samples() if "duration" in name}
    assert before["isthmus_request_duration_seconds_count", (("app", "web"),)] == 2
    totals.handle_gone("worker-0/10")
    totals.handle_samples("worker-0/11", served().samples())
    assert {(name, labels): value for name, labels, value in totals.samples() if "duration" in name} == before
    totals.handle_samples("worker-0/11", served(0.002).samples())
    after = {(name, labels): value for name, labels, value in totals.samples()}
    assert after["isthmus_request_duration_seconds_count", (("app", "web"),)] == 3


def test_exposition_is_understood_with_type_help_and_labels() -> None:
    totals = WorkerTotals()
    totals.handle_samples("worker-0/1", served(0.002, 0.3).samples())
    samples = [
        *totals.samples(),
        ("isthmus_members", (("state", "alive"),), 2.0),
        ("isthmus_errors_total", (("code", 'a"b\\c\nd'),), 1.0),
    ]
    body, content_type = expose(samples)
    assert content_type.startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    known = known_metrics()
    for name, family in families.items():
        kind, text = known.get(name) or known[f"{name}_total"]
        assert (family.type, family.documentation) == (kind, text)
    (member,) = families["isthmus_members"].samples
    assert (member.labels, member.value) == ({"state": "alive"}, 2.0)
    (error,) = families["isthmus_errors"].samples
    assert (error.name, error.labels) == ("isthmus_errors_total", {"code": 'a"b\\c\nd'})
    duration = families["isthmus_request_duration_seconds"]
    buckets = [sample.value for sample in duration.samples if sample.name.endswith("_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == 2


def test_sample_that_no_table_describes_is_an_error() -> None:
    with pytest.raises(KeyError, match="isthmus_unheard_of"):
        expose([("isthmus_unheard_of", (), 1.0)])


def test_no_two_parts_describe_the_same_metric() -> None:
    tables = (
        proxy.metrics.METRICS,
        proxy.peer_metrics.METRICS,
        proxy.tls_metrics.METRICS,
        replication.metrics.METRICS,
        replication.subscriptions.METRICS,
        checker.METRICS,
        wiring.METRICS,
        keeper.METRICS,
        rollouts.METRICS,
        conductor.METRICS,
        credentials.METRICS,
        OWN_METRICS,
    )
    assert sum(len(table) for table in tables) == len(known_metrics())


def test_counters_end_in_total_and_gauges_do_not() -> None:
    for name, (kind, text) in known_metrics().items():
        assert name.startswith("isthmus_")
        assert (kind == "counter") == name.endswith("_total"), name
        assert kind in ("counter", "gauge", "histogram")
        assert text
