"""Traces: what is carried on, what is recorded, and that a collector understands it."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.json_format import Parse
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from proxy.access_log import AccessLog
from proxy.core.explain_proof import derive_key, make_proof
from proxy.core.trace_context import (
    SAMPLED,
    TraceContext,
    TraceIds,
    parse_traceparent,
    render_traceparent,
    split_context,
)
from proxy.core.traced_exchange import CLIENT, SERVER, Span
from proxy.metrics import ProxyMetrics
from proxy.tracing import Tracer, TracingSettings
from tests.fakes.machine import OK, FakeMachine
from tests.proxy.edge import Edge, wait_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from opentelemetry.proto.trace.v1.trace_pb2 import Span as TakenSpan

    from tests.fakes.machine import Connection, Request

TRACE = b"4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = b"00f067aa0ba902b7"
GIVEN = b"traceparent: 00-%b-%b-01" % (TRACE, PARENT)
REPLAY = b"HTTP/1.1 200 OK\r\nfly-replay: instance=m2\r\nContent-Length: 0\r\n\r\n"


class Collector(FakeMachine):
    """Takes OTLP in JSON as OpenTelemetry's own definition has it."""

    def take(self) -> list[TakenSpan]:
        return [span for one in self.decode() for scope in one.scope_spans for span in scope.spans]

    def decode(self) -> list[Any]:
        taken: list[Any] = []
        for request in self.requests:
            assert request.values(b"content-type") == [b"application/json"]
            raw = json.loads(request.body)
            for span in raw["resourceSpans"][0]["scopeSpans"][0]["spans"]:
                # Where OTLP's JSON differs from protobuf's: ids are hexadecimal, not base64.
                for name, size in (("traceId", 16), ("spanId", 8), ("parentSpanId", 8)):
                    if name in span:
                        assert len(bytes.fromhex(span[name])) == size
                        span[name] = base64.b64encode(bytes.fromhex(span[name])).decode()
            taken += Parse(json.dumps(raw), ExportTraceServiceRequest()).resource_spans
        return taken


def said(span: TakenSpan) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


@pytest.fixture
async def collector(edge: Edge) -> AsyncIterator[Collector]:
    collector = Collector()
    await collector.start()
    edge.machines.append(collector)
    yield collector
    if edge.tracer is not None:
        await asyncio.to_thread(edge.tracer.close)


def trace(edge: Edge, collector: Collector, **settings: Any) -> None:
    endpoint, resource = f"http://127.0.0.1:{collector.port}", {"service.name": "s"}
    edge.tracer = Tracer(TracingSettings(endpoint, resource=resource, **settings), edge.metrics)


async def spans_of(edge: Edge, collector: Collector, count: int) -> list[TakenSpan]:
    await wait_for(lambda: edge.metrics.spans_sent >= count)
    return sorted(collector.take(), key=lambda span: (span.kind, span.start_time_unix_nano))


# W3C Trace Context


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"00",
        b"00-%b-%b" % (TRACE, PARENT),
        b"00-%b-%b-01-" % (TRACE, PARENT),
        b"00-%b-%b-01-x" % (TRACE, PARENT),
        b"ff-%b-%b-01" % (TRACE, PARENT),
        b"0-%b-%b-01" % (TRACE, PARENT),
        b"00-%b-%b-1" % (TRACE, PARENT),
        b"00-%b-%b-01" % (TRACE.upper(), PARENT),
        b"00-%b-%b-01" % (b"0" * 32, PARENT),
        b"00-%b-%b-01" % (TRACE, b"0" * 16),
        b"00-%b-%b-01" % (TRACE[1:], PARENT),
        b"00-%b-%b-0x" % (TRACE, PARENT),
        b"cc-%b-%b-01x" % (TRACE, PARENT),
    ],
)
def test_what_is_no_traceparent_is_not_believed(value: bytes) -> None:
    assert parse_traceparent(value) is None


@pytest.mark.parametrize(
    ("value", "flags"),
    [
        (b"00-%b-%b-00", 0),
        (b" 00-%b-%b-01 ", 1),
        (b"00-%b-%b-03", 3),
        (b"00-%b-%b-ff", 3),
        (b"cc-%b-%b-01", 1),
        (b"cc-%b-%b-01-what-comes-later", 1),
    ],
)
def test_a_traceparent_is_read_as_far_as_it_is_known(value: bytes, flags: int) -> None:
    context = parse_traceparent(value % (TRACE, PARENT))
    assert context == TraceContext(TRACE, PARENT, flags)
    assert render_traceparent(context) == b"traceparent: 00-%b-%b-%02x\r\n" % (TRACE, PARENT, flags)


@given(st.binary(max_size=70))
def test_no_bytes_break_the_parser(value: bytes) -> None:
    parse_traceparent(value)


def test_two_parents_are_none_and_lose_their_state() -> None:
    lines = [GIVEN, b"Accept: */*", GIVEN, b"TraceState: a=b"]
    assert split_context(lines, believed=True) == (None, b"", [b"Accept: */*"])


def test_states_of_several_lines_are_one() -> None:
    parent, state, others = split_context([b"tracestate: a=1", GIVEN, b"tracestate:b=2"], believed=True)
    assert (parent, state, others) == (TraceContext(TRACE, PARENT, 1), b"a=1,b=2", [])
    assert split_context([b"tracestate: a=1", GIVEN], believed=False) == (None, b"", [])


@pytest.mark.parametrize(("ratio", "least", "most"), [(0.0, 0, 0), (1.0, 2_000, 2_000), (0.25, 400, 600)])
def test_so_many_of_the_traces_are_recorded(ratio: float, least: int, most: int) -> None:
    ids = TraceIds(random.Random(3).getrandbits, ratio)
    traces = [ids.begin() for _ in range(2_000)]
    assert least <= sum(one.is_sampled for one in traces) <= most
    assert len({one.trace_id for one in traces}) == len({one.span_id for one in traces}) == 2_000
    assert all(parse_traceparent(render_traceparent(one)[12:-2]) == one for one in traces)


# Through the proxy


async def test_without_a_tracer_the_fields_are_carried_on_as_they_came(edge: Edge) -> None:
    machine = await edge.machine()
    await edge.start()
    lines = (b"TraceParent: 99-whatever", b"tracestate: a=b", b"tracestate: c")
    await edge.get(b"/", *lines)
    assert all(line in machine.requests[0].head for line in lines)
    assert machine.requests[0].values(b"traceparent") == [b"99-whatever"]


async def test_a_request_is_a_servers_span_with_one_of_a_client(edge: Edge, collector: Collector) -> None:
    trace(edge, collector)
    machine = await edge.machine(region="gru")
    await edge.start()
    response = await edge.get(b"/a/b?token=secret", b"User-Agent: curl/8")
    client, server = sorted(await spans_of(edge, collector, 2), key=lambda span: -span.kind)
    assert (server.kind, client.kind) == (SERVER, CLIENT)
    assert said(server) == {
        "http.request.method": "GET",
        "url.path": "/a/b",
        "url.scheme": "http",
        "server.address": "app.test",
        "server.port": 80,
        "client.address": "127.0.0.1",
        "network.protocol.version": "1.1",
        "user_agent.original": "curl/8",
        "http.response.status_code": 200,
        "http.response.body.size": 2,
        "isthmus.request_id": response.values(b"fly-request-id")[0].decode(),
        "isthmus.app": "app",
        "isthmus.machine": "m1",
        "isthmus.region": "gru",
    }
    assert said(client) == {
        "http.request.method": "GET",
        "url.full": f"http://127.0.0.1:{machine.port}/a/b",
        "server.address": "127.0.0.1",
        "server.port": machine.port,
        "http.response.status_code": 200,
        "isthmus.app": "app",
        "isthmus.machine": "m1",
        "isthmus.region": "gru",
    }
    assert (server.name, server.status.code, server.parent_span_id) == ("GET", 0, b"")
    assert (client.trace_id, client.parent_span_id) == (server.trace_id, server.span_id)
    assert server.start_time_unix_nano <= client.start_time_unix_nano
    assert client.start_time_unix_nano <= client.end_time_unix_nano <= server.end_time_unix_nano
    (told,) = machine.requests[0].values(b"traceparent")
    assert told == b"00-%b-%b-01" % (client.trace_id.hex().encode(), client.span_id.hex().encode())
    (resource,) = {one.resource.attributes[0].value.string_value for one in collector.decode()}
    assert resource == "s"


async def test_a_recorded_trace_of_the_client_goes_on(edge: Edge, collector: Collector) -> None:
    trace(edge, collector, ratio=0.0)
    machine = await edge.machine()
    await edge.start()
    await edge.get(b"/", GIVEN, b"tracestate: vendor=1")
    server, client = await spans_of(edge, collector, 2)
    assert server.trace_id.hex().encode() == TRACE
    assert server.parent_span_id.hex().encode() == PARENT
    assert (server.trace_state, client.trace_state) == ("vendor=1", "vendor=1")
    expected = b"00-%b-%b-01" % (TRACE, client.span_id.hex().encode())
    assert machine.requests[0].values(b"traceparent") == [expected]
    assert machine.requests[0].values(b"tracestate") == [b"vendor=1"]


@pytest.mark.parametrize("ratio", [0.0, 1.0])
async def test_a_trace_that_the_client_does_not_record_is_passed_on(
    edge: Edge, collector: Collector, ratio: float
) -> None:
    trace(edge, collector, ratio=ratio)
    machine = await edge.machine()
    await edge.start()
    await edge.get(b"/", GIVEN[:-1] + b"0")
    assert machine.requests[0].values(b"traceparent") == [GIVEN[13:-1] + b"0"]
    assert edge.tracer is not None
    await asyncio.to_thread(edge.tracer.close)
    assert collector.requests == []


async def test_a_trace_that_is_not_recorded_tells_machines_so(edge: Edge, collector: Collector) -> None:
    trace(edge, collector, ratio=0.0)
    machine = await edge.machine()
    await edge.start()
    await edge.get(b"/", b"traceparent: 00-nonsense", b"tracestate: a=b")
    (told,) = machine.requests[0].values(b"traceparent")
    context = parse_traceparent(told)
    assert context is not None
    assert context.flags == 0
    assert machine.requests[0].values(b"tracestate") == []


async def test_a_client_that_is_not_believed_begins_a_trace_of_its_own(
    edge: Edge, collector: Collector
) -> None:
    trace(edge, collector, believe_clients=False)
    await edge.machine()
    await edge.start()
    await edge.get(b"/", GIVEN)
    server, _ = await spans_of(edge, collector, 2)
    assert server.trace_id.hex().encode() != TRACE
    assert server.parent_span_id == b""


async def test_each_machine_that_was_tried_is_a_span(
    edge: Edge, collector: Collector, tmp_path: Path
) -> None:
    """With an access log as well: both see the same."""
    trace(edge, collector)
    edge.access_log = AccessLog(str(tmp_path / "log"), "json", 1, edge.metrics)
    dead = await edge.machine("m1")
    await dead.stop()
    alive = await edge.machine("m2", region="gru")
    await edge.start()
    client = await edge.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 5\r\n\r\nhello")
    await client.read_response()
    server, failed, answered = await spans_of(edge, collector, 3)
    assert said(failed)["isthmus.machine"] == "m1"
    assert said(failed)["error.type"].startswith("PC")
    assert failed.status.code == 2
    assert (said(answered)["isthmus.machine"], said(answered)["http.request.resend_count"]) == ("m2", 1)
    assert (answered.status.code, server.status.code) == (0, 0)
    assert said(server)["isthmus.retries"] == 1
    assert said(server)["http.request.body.size"] == 5
    assert answered.span_id.hex().encode() in alive.requests[0].values(b"traceparent")[0]
    edge.access_log.close()
    (line,) = (tmp_path / "log").read_bytes().splitlines()
    assert json.loads(line)["retries"] == 1


async def test_a_replay_is_two_spans_and_the_second_says_who_asked(edge: Edge, collector: Collector) -> None:
    trace(edge, collector)
    first = await edge.machine("m1", answer=lambda r: REPLAY)
    second = await edge.machine("m2", region="gru")
    await edge.start()
    await edge.get()
    server, asked, answered = await spans_of(edge, collector, 3)
    assert said(server)["isthmus.replays"] == 1
    assert said(asked)["isthmus.replayed"] is True
    assert (said(asked)["isthmus.machine"], said(answered)["isthmus.machine"]) == ("m1", "m2")
    assert said(answered)["isthmus.replay_source"] == "m1"
    told = [r.values(b"traceparent") for r in (*first.requests, *second.requests)]
    assert [len(one) for one in told] == [1, 1]
    assert told[0] != told[1]


async def test_an_answer_of_the_proxy_is_a_failed_span(edge: Edge, collector: Collector) -> None:
    trace(edge, collector)
    edge.put_app("app", "app.test")
    await edge.start()
    response = await edge.exchange(b"BREW /\xff HTTP/1.1\r\nHost: [::1]:81\r\n\r\n")
    response = await edge.get()
    (server,) = await spans_of(edge, collector, 1)
    assert said(server)["error.type"] == response.error
    assert (said(server)["http.response.status_code"], server.status.code) == (503, 2)


async def test_a_lost_machine_and_a_lost_client_end_their_spans(edge: Edge, collector: Collector) -> None:
    async def behave(connection: Connection) -> None:
        request = await connection.read_request()
        if b"/wait" in request.line:
            await connection.read()

    trace(edge, collector)
    await edge.machine(behave=behave)
    await edge.start()
    response = await edge.exchange(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 0\r\n\r\n")
    client = await edge.client()
    client.send(b"PROPFIND /wait HTTP/1.1\r\nHost: app.test\r\n\r\n")
    await wait_for(lambda: len(edge.machines[-1].connections) == 2)
    client.close()
    lost, left, *attempts = await spans_of(edge, collector, 4)
    of = {attempt.parent_span_id: attempt for attempt in attempts}
    assert said(lost)["error.type"] == response.error
    assert said(of[lost.span_id])["error.type"] == response.error
    assert (said(left)["http.response.status_code"], left.status.code, left.name) == (499, 0, "HTTP")
    assert said(left)["http.request.method_original"] == "PROPFIND"
    assert "http.response.status_code" not in said(of[left.span_id])


async def test_tracing_begins_and_ends_for_connections_that_are_open(
    edge: Edge, collector: Collector
) -> None:
    await edge.machine()
    await edge.start()
    client = await edge.client()
    await client.get(b"/before")
    trace(edge, collector)
    await edge.server.adopt(edge.settings, None, tracer=edge.tracer)
    await client.get(b"/traced")
    server, _ = await spans_of(edge, collector, 2)
    assert said(server)["url.path"] == "/traced"
    await edge.server.adopt(edge.settings, None)
    await client.get(b"/after")
    assert edge.tracer is not None
    await asyncio.to_thread(edge.tracer.close)
    assert edge.metrics.spans_sent == 2


async def test_a_trace_through_a_tunnel_ends_with_it(edge: Edge, collector: Collector) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nabc"
        )

    trace(edge, collector)
    await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    await client.read_to_end()
    server, _ = await spans_of(edge, collector, 2)
    assert (said(server)["http.response.status_code"], said(server)["http.response.body.size"]) == (101, 3)


# The collector

SPAN = Span(TraceContext(TRACE, PARENT, SAMPLED), b"", b"", SERVER, "GET", 1, 2, {}, False)


def tracer_for(collector: Collector, metrics: ProxyMetrics, **settings: Any) -> Tracer:
    return Tracer(TracingSettings(f"http://127.0.0.1:{collector.port}", **settings), metrics)


async def test_spans_are_sent_together_with_what_the_settings_add(collector: Collector) -> None:
    metrics = ProxyMetrics()
    tracer = tracer_for(collector, metrics, headers={"authorization": "Bearer x"}, resource={"a": 1})
    for _ in range(300):
        tracer.add_spans([SPAN])
    await asyncio.to_thread(tracer.close)
    assert [len(one.scope_spans[0].spans) for one in collector.decode()] == [256, 44]
    assert collector.requests[0].line == b"POST /v1/traces HTTP/1.1"
    assert collector.requests[0].values(b"authorization") == [b"Bearer x"]
    assert len(collector.connections) == 1
    assert (metrics.spans_sent, metrics.spans_dropped) == (300, 0)


async def test_a_path_that_is_given_is_used(collector: Collector) -> None:
    tracer = Tracer(TracingSettings(f"http://127.0.0.1:{collector.port}/x/otlp"), ProxyMetrics())
    tracer.add_spans([SPAN])
    await asyncio.to_thread(tracer.close)
    assert collector.requests[0].line == b"POST /x/otlp HTTP/1.1"


async def test_what_the_collector_refuses_for_good_is_dropped_at_once(
    collector: Collector, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.tracing._PAUSES_S", (0.0,))
    collector.answer = lambda r: b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
    metrics = ProxyMetrics()
    tracer = tracer_for(collector, metrics)
    tracer.add_spans([SPAN] * 256)
    tracer.add_spans([SPAN])
    tracer.handle_deadline()
    await wait_for(lambda: metrics.spans_dropped == 257)
    await asyncio.to_thread(tracer.close)
    assert len(collector.requests) == 2
    assert len([r for r in caplog.records if "the collector answered 400" in r.message]) == 1


async def test_what_it_refuses_for_now_is_sent_again(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: Request) -> bytes:
        busy = len(collector.requests) < 3
        return b"HTTP/1.1 503 Busy\r\nConnection: close\r\nContent-Length: 0\r\n\r\n" if busy else OK

    monkeypatch.setattr("proxy.tracing._PAUSES_S", (0.0, 0.0, 0.0))
    collector.answer = answer
    metrics = ProxyMetrics()
    tracer = tracer_for(collector, metrics)
    tracer.add_spans([SPAN])
    tracer.handle_deadline()
    await wait_for(lambda: metrics.spans_sent == 1)
    assert len(collector.requests) == 3
    await asyncio.to_thread(tracer.close)


async def test_a_collector_that_is_away_or_slow_costs_spans_and_stops_nobody(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()
    metrics = ProxyMetrics()
    tracer = tracer_for(collector, metrics)
    monkeypatch.setattr(tracer, "_post", lambda body: (held.wait() and "", False))
    while not metrics.spans_dropped:
        tracer.add_spans([SPAN] * 256)
    held.set()
    await asyncio.to_thread(tracer.close)
    assert metrics.spans_sent >= 32 * 256
    monkeypatch.setattr("proxy.tracing._PAUSES_S", (0.0,))
    await collector.stop()
    dropped = metrics.spans_dropped
    tracer = tracer_for(collector, metrics)
    tracer.add_spans([SPAN])
    await asyncio.to_thread(tracer.close)
    assert metrics.spans_dropped == dropped + 1


async def test_a_request_that_is_explained_is_traced_like_others(edge: Edge, collector: Collector) -> None:
    trace(edge, collector)
    machine = await edge.machine()
    await edge.start()
    key = derive_key(b"k")
    edge.server.explain_to((key,))
    proof = make_proof(key, b"app.test", int(time.time()) + 60).encode()
    response = await edge.get(b"/", b"Isthmus-Explain: " + proof, GIVEN)
    assert len(response.values(b"isthmus-trace")) == 2
    spans = await spans_of(edge, collector, 2)
    assert [span.kind for span in spans] == [SERVER, CLIENT]
    assert [span.trace_id.hex().encode() for span in spans] == [TRACE] * 2
    (parent,) = machine.requests[0].values(b"traceparent")
    assert parent.split(b"-")[1:3] == [TRACE, spans[1].span_id.hex().encode()]
