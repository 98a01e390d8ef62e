"""What the proxy counts: by app, region and machine, with no more labels than it says, and readable."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from isthmus.admin.metrics import WorkerTotals, expose
from proxy.metrics import APPS_MAX, MACHINES_MAX, METRICS, OTHER, ProxyMetrics
from routing.target import Target
from routing.types import MachineState
from tests.proxy.edge import wait_for

if TYPE_CHECKING:
    from prometheus_client import Metric

    from tests.fakes.machine import Connection
    from tests.proxy.edge import Edge

UPGRADED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


def read(metrics: ProxyMetrics) -> dict[str, Metric]:
    """What Prometheus reads of a node with one such worker, by name."""
    totals = WorkerTotals()
    totals.handle_samples("worker-0/1", metrics.samples())
    text, _ = expose(totals.samples())
    return {family.name: family for family in text_string_to_metric_families(text.decode())}


def value(metrics: ProxyMetrics, name: str, **labels: str) -> float:
    """The sum over all samples of that name that have these labels."""
    family = name.removesuffix("_total")
    for suffix in ("_bucket", "_sum", "_count"):
        family = family.removesuffix(suffix)
    samples = [s for s in read(metrics)[family].samples if s.name == name]
    return sum(s.value for s in samples if labels.items() <= s.labels.items())


def target(number: int, region: str = "ams", app: str = "web") -> Target:
    name, host = f"m{number}", "127.0.0.1"
    return Target((name, app, "node1", region, host, 1, MachineState.STARTED, False, "", "", 0, "", 100, 0))


def test_every_sample_is_described_and_histograms_add_up() -> None:
    metrics = ProxyMetrics()
    metrics.record("a", None, 200, 0.003, 10, 100)
    metrics.record("a", target(1, app="a"), 503, 100.0, 1, 2)
    metrics.count_error("PR01", "a")
    metrics.count_error("PH01")
    metrics.count_connect_failure("PC01")
    assert {name for name, _, _ in metrics.samples()} <= set(METRICS)
    assert value(metrics, "isthmus_requests_total", app="a", status="5xx") == 1
    assert value(metrics, "isthmus_request_duration_seconds_bucket", app="a", le="0.005") == 1
    assert value(metrics, "isthmus_request_duration_seconds_bucket", app="a", le="+Inf") == 2
    assert value(metrics, "isthmus_request_duration_seconds_count", app="a") == 2
    assert value(metrics, "isthmus_request_duration_seconds_sum", app="a") == 100.003
    assert value(metrics, "isthmus_machine_request_duration_seconds_count", machine="m1", region="ams") == 1
    assert value(metrics, "isthmus_request_bytes_total") == 11
    assert value(metrics, "isthmus_response_bytes_total") == 102
    assert value(metrics, "isthmus_errors_total", app="a", code="PR01") == 1
    assert value(metrics, "isthmus_errors_total") == 2


def test_more_machines_than_are_told_apart_are_counted_together_by_region() -> None:
    metrics = ProxyMetrics()
    targets = [target(n, "gru" if n % 2 else "ams") for n in range(MACHINES_MAX + 100)]
    for one in targets * 2:
        metrics.record("web", one, 200, 0.1, 1, 1)
    machines = {
        s.labels["machine"]
        for s in read(metrics)["isthmus_machine_requests"].samples
        if s.name == "isthmus_machine_requests_total"
    }
    assert len(machines) == MACHINES_MAX + 1
    assert value(metrics, "isthmus_machine_requests_total", machine=OTHER, region="gru") == 100
    assert value(metrics, "isthmus_machine_requests_total", region="gru") == MACHINES_MAX + 100


def test_a_machine_that_was_removed_makes_room_for_another() -> None:
    metrics = ProxyMetrics()
    targets = [target(n) for n in range(MACHINES_MAX)]
    for one in targets:
        metrics.machine(one)
    targets[0].removed = True
    assert metrics.machine(target(MACHINES_MAX)).target is None
    metrics.samples()
    assert metrics.machine(target(MACHINES_MAX)).target is not None
    assert value(metrics, "isthmus_machine_connections_total", machine="m0") == 0


def test_a_machine_with_the_name_of_a_removed_one_is_counted_anew() -> None:
    metrics = ProxyMetrics()
    metrics.record("web", target(1), 200, 0.1, 0, 0)
    metrics.record("web", target(1, "gru"), 200, 0.1, 0, 0)
    assert value(metrics, "isthmus_machine_requests_total", machine="m1", region="gru") == 1
    assert value(metrics, "isthmus_machine_requests_total", machine="m1", region="ams") == 0


def test_more_apps_than_are_told_apart_are_counted_together_until_some_are_gone() -> None:
    metrics = ProxyMetrics()
    for n in range(APPS_MAX + 5):
        metrics.record(f"app{n}", None, 200, 0.1, 0, 0)
        metrics.count_error("PR01", f"app{n}")
    assert value(metrics, "isthmus_requests_total", app=OTHER) == 5
    assert value(metrics, "isthmus_errors_total", app=OTHER) == 5
    metrics.forget_apps(lambda name: name == "app1")
    metrics.record("late", None, 200, 0.1, 0, 0)
    assert set(metrics.apps) == {"app1", OTHER, "late"}


async def test_a_request_is_counted_for_its_app_its_machine_and_its_region(edge: Edge) -> None:
    dead = await edge.machine("m1")
    await dead.stop()
    await edge.machine("m2", region="gru")
    await edge.start()
    client = await edge.client()
    for _ in range(2):
        client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 5\r\n\r\nhello")
        await client.read_response()
    labels = {"app": "app", "machine": "m2", "region": "gru"}
    metrics = edge.metrics
    assert value(metrics, "isthmus_machine_requests_total", status="2xx", **labels) == 2
    assert value(metrics, "isthmus_machine_request_bytes_total", **labels) == 10
    assert value(metrics, "isthmus_machine_response_bytes_total", **labels) == 4
    assert value(metrics, "isthmus_machine_request_duration_seconds_count", **labels) == 2
    assert value(metrics, "isthmus_machine_connections_total", **labels) == 1
    assert value(metrics, "isthmus_machine_failures_total", machine="m1") == 1
    assert value(metrics, "isthmus_machine_requests_total", machine="m1") == 0
    assert value(metrics, "isthmus_request_bytes_total", app="app") == 10


async def test_a_replay_is_counted_for_the_machine_that_asked(edge: Edge) -> None:
    await edge.machine(
        "m1", answer=lambda r: b"HTTP/1.1 200 OK\r\nfly-replay: instance=m2\r\nContent-Length: 3\r\n\r\nxyz"
    )
    await edge.machine("m2", region="gru")
    await edge.start()
    await edge.get()
    assert value(edge.metrics, "isthmus_machine_replays_total", machine="m1") == 1
    assert value(edge.metrics, "isthmus_machine_replays_total", machine="m2") == 0
    assert value(edge.metrics, "isthmus_machine_response_bytes_total", machine="m2") == 2


async def test_a_lost_answer_is_a_failure_of_its_machine_and_an_error_of_its_app(edge: Edge) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_request()

    await edge.machine(behave=behave)
    await edge.start()
    response = await edge.exchange(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 0\r\n\r\n")
    assert value(edge.metrics, "isthmus_errors_total", app="app", code=response.error) == 1
    assert value(edge.metrics, "isthmus_machine_failures_total", machine="m1") == 1
    assert value(edge.metrics, "isthmus_machine_requests_total", machine="m1", status="5xx") == 1
    assert value(edge.metrics, "isthmus_response_bytes_total", app="app") == len(response.body)


async def test_what_went_through_a_tunnel_is_counted_when_it_ends(edge: Edge) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(UPGRADED + b"abc")
        await connection.read_until(b"12345")
        connection.writer.write(b"de")

    await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    head = b"GET / HTTP/1.1\r\nHost: app.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    client.send(head + b"12")
    await asyncio.sleep(0)
    client.send(b"345")
    assert (await client.read_to_end()).endswith(b"abcde")
    await wait_for(lambda: not edge.metrics.in_flight)
    assert value(edge.metrics, "isthmus_request_bytes_total", app="app") == 5
    assert value(edge.metrics, "isthmus_response_bytes_total", app="app") == 5
