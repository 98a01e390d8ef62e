"""The exchange alone: a script of events, and what it did to its neighbours."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from proxy.admission import Admission
from proxy.core.errors import CONNECT_REFUSED, UPSTREAM_RESET, UPSTREAM_TIMEOUT
from proxy.core.exchange import Exchange
from proxy.core.framing import COPIED_BYTES_MAX
from proxy.core.plane import Plane
from proxy.core.queue import Queue
from proxy.core.request_head import parse_request_head
from proxy.core.request_id import RequestIds
from proxy.core.response_head import parse_response_head
from proxy.metrics import ProxyMetrics
from proxy.settings import ProxySettings
from routing.balancer import ANYWHERE, Balancer
from routing.table import RoutingTable

GET = b"GET /x HTTP/1.1\r\nHost: app.test\r\n\r\n"
POST = b"POST /x HTTP/1.1\r\nHost: app.test\r\nContent-Length: 6\r\n\r\n"
OK = parse_response_head(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")


class World:
    """All neighbours of one exchange; `log` is what they were told, in order."""

    def __init__(self, *machines: str, idle: bool = False, **settings: object) -> None:
        self.log: list[str] = []
        self.sent: list[bytes] = []  # to machines
        self.answer = b""  # to the client
        self.now = 100.0
        self.idle = idle  # whether there are idle connections
        self.port = 80
        self.table = RoutingTable("n1")
        self.table.apply("apps", ("app",), ("app", "default", ""))
        self.table.apply("services", ("app", 0), ("app", 0, 8080, "requests", 10, None, "[]", ""))
        for name in machines:
            row = (name, "app", "n1", "ams", "10.0.0.1:80", "started", 0, "")
            self.table.apply("machines", (name,), row)
        assert not self.table.rejected
        self.metrics = ProxyMetrics()
        self.plane = Plane(
            settings=replace(ProxySettings("n1", "ams"), **settings),
            table=self.table,
            balancer=Balancer(self.table, "ams", random.Random(1)),
            metrics=self.metrics,
            connector=self,
            queue=Queue(settings.get("queue_max", 1_024), self.metrics),
            request_ids=RequestIds(lambda bits: 0, "ams"),
            now=lambda: self.now,
            wall_us=lambda: 5_000,
            admission=Admission(ProxySettings("n1", "ams"), self.metrics, 1_000),
            body_kept_max=settings.get("replay_body_bytes_max", 1_048_576),
        )
        self.target = ""  # of the last connection asked for

    def exchange(self, raw: bytes, body: bytes = b"", ended: bool = True) -> Exchange:
        service = self.table.service("app", 80)
        assert service is not None
        head = parse_request_head(raw, self.plane.settings)
        exchange = Exchange(self.plane, self, head, service, ANYWHERE, b"X-Client: 1\r\n")
        exchange.start(body, ended)
        return exchange

    def take(self) -> list[str]:
        log, self.log = self.log, []
        return log

    def in_flight(self) -> int:
        return sum(target.in_flight for target in self.table.targets())

    # The connector

    def acquire(self, target, port, exchange, *, fresh):
        self.target = target.id
        self.log.append("connect fresh" if fresh else "connect")
        return FakeConnection(self, reused=True) if self.idle and not fresh else None

    # The client

    def write(self, data: bytes) -> None:
        self.answer += data
        self.log.append("answer")

    def writelines(self, pieces) -> None:
        self.answer += b"".join(pieces)
        self.log.append("answer uncopied")

    def pause_body(self) -> None:
        self.log.append("pause body")

    def resume_body(self) -> None:
        self.log.append("resume body")

    def finish(self, *, keep: bool) -> None:
        self.log.append("finish keep" if keep else "finish close")

    def abort(self) -> None:
        self.log.append("abort")

    def start_tunnel(self, machine, data: bytes) -> None:
        self.log.append("tunnel")


class FakeConnection:
    def __init__(self, world: World, *, reused: bool = False) -> None:
        self.world = world
        self.reused = reused

    def begin(self, exchange: Exchange) -> None:
        self.world.log.append("begin")

    def write(self, data: bytes) -> None:
        self.world.sent.append(data)
        self.world.log.append("send")

    def __getattr__(self, name: str):
        return lambda: self.world.log.append(name)


SENT = ["begin", "send", "await_response"]


def test_a_get_in_one_write_each_way() -> None:
    world = World("m1", idle=True)
    exchange = world.exchange(GET)
    assert world.take() == ["connect", *SENT]
    assert world.in_flight() == 1
    assert world.sent[0].startswith(b"GET /x HTTP/1.1\r\nHost: app.test\r\nX-Client: 1\r\nFly-Request-Id: ")
    exchange.handle_response(OK, b"ok", ended=True)
    assert world.take() == ["answer", "release", "finish keep"]
    assert world.in_flight() == 0
    assert world.answer.endswith(b"\r\n\r\nok")


@pytest.mark.parametrize(
    ("size", "how"), [(COPIED_BYTES_MAX, "answer"), (COPIED_BYTES_MAX + 1, "answer uncopied")]
)
def test_a_large_body_is_not_joined_to_its_head(size: int, how: str) -> None:
    world = World("m1", idle=True)
    exchange = world.exchange(GET)
    world.take()
    head = parse_response_head(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
    exchange.handle_response(head, memoryview(b"x" * size), ended=True)
    assert world.take() == [how, "release", "finish keep"]
    assert world.answer.endswith(b"\r\n\r\n" + b"x" * size)


def test_a_failed_connection_is_tried_elsewhere_until_nobody_is_left() -> None:
    world = World("m1", "m2")
    exchange = world.exchange(GET)
    first = world.target
    exchange.handle_connect_failed(CONNECT_REFUSED, "no")
    assert world.target != first
    assert world.in_flight() == 1
    exchange.handle_connect_failed(CONNECT_REFUSED, "no")
    assert world.take() == ["connect", "connect", "answer", "finish keep"]
    assert world.answer.startswith(b"HTTP/1.1 502 ")
    assert world.in_flight() == 0


def test_attempts_are_bounded() -> None:
    world = World(*(f"m{n}" for n in range(20)), attempts_max=3)
    exchange = world.exchange(GET)
    for _ in range(3):
        exchange.handle_connect_failed(CONNECT_REFUSED, "no")
    assert world.take() == ["connect"] * 3 + ["answer", "finish keep"]


def test_a_client_that_left_while_connecting_leaves_a_connection_for_others() -> None:
    world = World("m1")
    exchange = world.exchange(GET)
    exchange.handle_client_lost()
    assert world.in_flight() == 0
    exchange.handle_connected(FakeConnection(world))
    assert world.take() == ["connect", "release"]


def test_a_stale_connection_is_replaced_by_a_fresh_one_to_the_same_machine() -> None:
    world = World("m1", idle=True)
    exchange = world.exchange(GET)
    exchange.handle_machine_lost(UPSTREAM_RESET, "")
    assert world.take() == ["connect", *SENT, "connect fresh"]
    exchange.handle_connected(FakeConnection(world))
    exchange.handle_machine_lost(UPSTREAM_RESET, "")
    assert world.take()[-2:] == ["answer", "finish keep"]
    assert world.in_flight() == 0


@pytest.mark.parametrize(("raw", "code"), [(POST, UPSTREAM_RESET), (GET, UPSTREAM_TIMEOUT)])
def test_what_may_have_been_done_is_not_done_twice(raw: bytes, code: str) -> None:
    world = World("m1", "m2", idle=True)
    exchange = world.exchange(raw, b"hello!")
    exchange.handle_machine_lost(code, "")
    assert world.take() == ["connect", *SENT, "answer", "finish keep"]


def test_a_body_waits_for_its_machine_up_to_the_buffer() -> None:
    world = World("m1", replay_body_bytes_max=4)
    exchange = world.exchange(POST, b"he", ended=False)
    exchange.handle_request_body(b"llo", ended=False)
    assert world.take() == ["connect", "pause body"]
    exchange.handle_connected(FakeConnection(world))
    assert world.take() == ["begin", "resume body", "send"]
    assert world.sent[0].endswith(b"\r\n\r\nhello")
    exchange.handle_request_body(b"!", ended=True)
    assert world.take() == ["send", "await_response"]
    assert exchange.body_lost


def test_a_slow_machine_pauses_the_client_only_while_there_is_a_body() -> None:
    world = World("m1", idle=True)
    exchange = world.exchange(POST, b"he", ended=False)
    world.take()
    exchange.handle_machine_slow(slow=True)
    exchange.handle_machine_slow(slow=False)
    exchange.handle_client_slow(slow=True)
    exchange.handle_client_slow(slow=False)
    assert world.take() == ["pause body", "resume body", "pause_reading", "resume_reading"]
    exchange.handle_request_body(b"llo!", ended=True)
    world.take()
    exchange.handle_machine_slow(slow=True)
    assert world.take() == []


def test_an_answer_that_breaks_off_is_cut_and_never_followed_by_an_error() -> None:
    world = World("m1", "m2", idle=True)
    exchange = world.exchange(GET)
    exchange.handle_response(parse_response_head(b"HTTP/1.1 200 OK\r\n\r\n"), b"par", ended=False)
    world.take()
    exchange.handle_machine_lost(UPSTREAM_RESET, "")
    assert world.take() == ["abort"]
    assert world.answer.endswith(b"3\r\npar\r\n")


def test_an_early_answer_closes_the_machine_and_keeps_a_client_with_little_left_to_send() -> None:
    world = World("m1", idle=True)
    exchange = world.exchange(POST, b"he", ended=False)
    world.take()
    exchange.handle_response(OK, b"ok", ended=True)
    assert world.take() == ["answer", "close", "finish keep"]


def test_a_replay_timeout_counts_from_the_instruction_until_a_machine_is_reached() -> None:
    world = World("m1", "m2", idle=True)
    exchange = world.exchange(GET)
    world.idle = False
    head = parse_response_head(
        b"HTTP/1.1 200 OK\r\nfly-replay: elsewhere=true;timeout=500ms\r\nContent-Length: 0\r\n\r\n"
    )
    exchange.handle_response(head, b"", ended=True)
    assert exchange.reach_timeout_s() == pytest.approx(0.5)
    world.now += 0.6
    exchange.handle_connect_failed(CONNECT_REFUSED, "no")
    assert b"the replay's timeout passed" in world.answer
    assert world.in_flight() == 0


def test_a_draining_worker_says_that_it_closes() -> None:
    world = World("m1", idle=True)
    exchange = world.exchange(GET)
    world.plane.draining = True
    exchange.handle_response(OK, b"ok", ended=True)
    assert world.take()[-1] == "finish close"
    assert b"Connection: close\r\n" in world.answer


EVENTS = {
    "connected": lambda w, e: e.handle_connected(FakeConnection(w)),
    "refused": lambda w, e: e.handle_connect_failed(CONNECT_REFUSED, "no"),
    "body": lambda w, e: e.handle_request_body(b"x", ended=False),
    "body end": lambda w, e: e.handle_request_body(b"x", ended=True),
    "answer": lambda w, e: e.handle_response(OK, b"o", ended=False),
    "answer whole": lambda w, e: e.handle_response(OK, b"ok", ended=True),
    "replay": lambda w, e: e.handle_response(
        parse_response_head(b"HTTP/1.1 200 OK\r\nfly-replay: elsewhere=true\r\n\r\n"), b"", ended=True
    ),
    "more": lambda w, e: e.handle_response_body(b"k", ended=False),
    "end": lambda w, e: e.handle_response_body(b"", ended=True),
    "reset": lambda w, e: e.handle_machine_lost(UPSTREAM_RESET, ""),
    "gone": lambda w, e: e.handle_client_lost(),
}


def possible(exchange: Exchange) -> list[str]:
    """The events that its neighbours may send now, by their contracts."""
    phase = exchange.phase.name
    events = [] if phase == "DONE" else ["gone"]
    if phase != "DONE" and not exchange.body_ended:
        events += ["body", "body end"]
    if phase == "REACHING":
        events += ["connected", "refused"]
    if phase == "WAITING":
        events += ["answer", "answer whole", "replay", "reset"]
    if phase == "RELAYING":
        events += ["more", "end", "reset"]
    return events


@pytest.mark.parametrize("seed", range(300))
def test_any_course_of_events_ends_once_and_leaves_nothing_counted(seed: int) -> None:
    rng = random.Random(seed)
    world = World(*(f"m{n}" for n in range(rng.randint(0, 3))), idle=rng.random() < 0.3)
    exchange = world.exchange(rng.choice((GET, POST)), b"", ended=rng.random() < 0.5)
    for _ in range(200):
        assert world.in_flight() == (exchange.target is not None)
        events = possible(exchange)
        if not events:
            break
        EVENTS[rng.choice(events)](world, exchange)
    assert exchange.phase.name == "DONE"
    assert world.in_flight() == 0
    assert world.metrics.in_flight == 0
    ends = [entry for entry in world.log if entry.startswith(("finish", "abort"))]
    assert len(ends) <= 1
    assert world.answer.count(b"HTTP/1.1 ") <= 1
