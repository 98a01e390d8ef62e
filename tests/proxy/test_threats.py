"""Classes of docs/security.md that take more than one message to show, through sockets."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from tests.fakes.machine import OK, Connection
from tests.hostile.answers import CUT, Answer
from tests.hostile.requests import NEXT, TOO_LARGE, Case, get
from tests.proxy.edge import wait_for

if TYPE_CHECKING:
    from tests.proxy.edge import Edge

UPGRADE = get(b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 7\r\n")


def named(name: bytes) -> object:
    return lambda r: b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(name), name)


# Framing


@pytest.mark.parametrize(
    "message",
    [
        b"Content-Length: 10\r\n\r\nhello",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nA\r\nhello",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
    ],
)
async def test_a_body_whose_client_leaves_is_no_request(edge: Edge, message: bytes) -> None:
    machine = await edge.machine()
    await edge.start()
    client = await edge.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\n" + message)
    await wait_for(lambda: bool(machine.connections))
    client.close()
    await wait_for(lambda: edge.metrics.upstreams_open == 0)
    assert machine.requests == []


async def test_the_rest_of_a_body_that_was_answered_early_is_never_a_request(edge: Edge) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_until(b"\r\n\r\n")
        connection.writer.write(OK)
        await connection.read()

    machine = await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: %d\r\n\r\n" % len(NEXT))
    assert (await client.read_response()).status == 200
    client.send(NEXT + get(line=b"GET /own HTTP/1.1"))
    assert (await client.read_response()).status == 200
    await wait_for(lambda: len(machine.connections) == 2)
    assert b"smuggled" not in machine.received
    assert machine.connections[1].received.startswith(b"GET /own ")


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"DELETE", b"OPTIONS"])
async def test_nothing_follows_a_body_that_its_machine_may_have_left_unread(
    edge: Edge, method: bytes
) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_until(b"\r\n\r\n")
        connection.writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await connection.read()
        await connection.read()

    machine = await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    for _ in range(2):
        client.send(
            method + b" / HTTP/1.1\r\nHost: app.test\r\nContent-Length: %d\r\n\r\n" % len(NEXT) + NEXT
        )
        assert (await client.read_response()).status == 204
    await wait_for(lambda: len(machine.connections) == 2)
    assert all(connection.received.count(b"Fly-Client-IP") <= 1 for connection in machine.connections)


@pytest.mark.parametrize("answer", CUT, ids=[repr(answer.raw[:70]) for answer in CUT])
async def test_an_answer_that_its_machine_cuts_is_never_whole_for_the_client(
    edge: Edge, answer: Answer
) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(answer.raw)

    await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    client.send(get())
    data = await client.read_to_end()
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    if b"Transfer-Encoding" in head:
        assert not body.endswith(b"0\r\n\r\n")
    else:
        assert len(body) < int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
    assert edge.metrics.aborted["machine"] == 1


async def test_trailers_of_an_answer_are_dropped_whatever_they_say(edge: Edge) -> None:
    trailers = b"fly-replay: instance=m2\r\nContent-Length: 7\r\nSet-Cookie: a=b\r\n"
    await edge.machine(
        "m1",
        answer=lambda r: (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n%b\r\n" % trailers
        ),
    )
    other = await edge.machine("m2", region="gru")
    await edge.start()
    client = await edge.client()
    client.send(get(b"Connection: close\r\n"))
    assert (await client.read_to_end()).endswith(b"2\r\nok\r\n0\r\n\r\n")
    assert other.requests == []


async def test_what_follows_a_refused_upgrade_is_a_request_and_waits_for_its_turn(edge: Edge) -> None:
    machine = await edge.machine(
        answer=lambda r: (
            b"HTTP/1.1 426 No\r\nContent-Length: 0\r\nSec-WebSocket-Version: 13\r\n\r\n"
            if b"Upgrade: websocket" in r.head
            else OK
        )
    )
    await edge.start()
    client = await edge.client()
    client.send(UPGRADE + NEXT)
    assert [(await client.read_response()).status for _ in range(2)] == [426, 200]
    assert [b"smuggled" in request.line for request in machine.requests] == [False, True]


# Identity and routing


async def test_the_app_is_that_of_the_host_that_is_forwarded(edge: Edge) -> None:
    app = await edge.machine("m1")
    other = await edge.machine("m2", app="other")
    await edge.start()
    response = await edge.exchange(b"GET http://other.test/x HTTP/1.1\r\nHost: app.test\r\n\r\n")
    assert response.status == 200
    assert (len(app.requests), other.requests[0].values(b"host")) == (0, [b"other.test"])


@pytest.mark.parametrize(
    ("path", "app"),
    [
        (b"/admin", b"admin"), (b"/admin/x", b"admin"), (b"//admin/x", b"admin"), (b"/%61dmin/x", b"admin"),
        (b"/x/../admin/x", b"admin"), (b"/x/%2e%2e/admin", b"admin"), (b"/x/..%2fadmin", b"admin"),
        (b"/.\\admin/x", b"admin"), (b"/%2fadmin", b"admin"), (b"/./admin/", b"admin"),
        (b"/administer", b"web"), (b"/admin/../x", b"web"), (b"/admin/%2e%2e/x", b"web"),
        (b"/x?/../admin", b"web"),
    ],
)  # fmt: skip
async def test_the_spelling_of_a_path_leads_around_no_prefix(edge: Edge, path: bytes, app: bytes) -> None:
    await edge.machine("m1", app="app", answer=named(b"web"))
    await edge.machine("m2", app="guarded", answer=named(b"admin"))
    edge.table.apply("hostnames", ("app.test", "/admin"), ("app.test", "/admin", "guarded", ""))
    await edge.start()
    assert (await edge.get(path)).body == app


@pytest.mark.parametrize(
    ("host", "answer"),
    [
        (b"a.sub.test", b"exact"), (b"A.SUB.test.", b"exact"), (b"b.sub.test", b"sub"),
        (b"x.b.sub.test", b"sub"), (b"c.test", b"star"), (b"sub.test", b"star"),
        (b"test", b""), (b"127.0.0.1", b""), (b"[::1]", b""),
        (b"xsub.test", b"star"), (b"other", b""),
    ],
)  # fmt: skip
async def test_the_most_specific_name_wins_and_an_unknown_one_leads_nowhere(
    edge: Edge, host: bytes, answer: bytes
) -> None:
    for name, pattern in (("exact", "a.sub.test"), ("sub", "*.sub.test"), ("star", "*.test")):
        edge.put_app(name, pattern)
        await edge.machine(f"m-{name}", app=name, answer=named(name.encode()))
    await edge.start()
    response = await edge.exchange(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
    assert (response.status, response.body if response.status == 200 else b"") == (
        200 if answer else 404,
        answer,
    )


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ('a;instance=m9"', ""), ("a=b, c %0d%0a", ""),
        *((state, "PA03") for state in ("\r\nX-Evil: 1", "\r\n\r\nGET /", "\0", "a\tb", "\x7f")),
    ],
)  # fmt: skip
async def test_the_state_of_a_replay_stays_within_its_field(edge: Edge, state: str, error: str) -> None:
    body = json.dumps({"instance": "m2", "state": state}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.fly.replay+json\r\nContent-Length: %d\r\n\r\n"
    await edge.machine("m1", answer=lambda r: head % len(body) + body)
    target = await edge.machine("m2", region="gru")
    await edge.start()
    assert (await edge.get()).error == error
    if error:
        assert target.received == b""
    else:
        (source,) = target.requests[0].values(b"fly-replay-src")
        assert source.startswith(b"instance=m1;region=ams;t=")
        assert source.count(b";") == 3


@pytest.mark.parametrize(
    "fields",
    [b"fly-replay: instance=" + b"a" * 9_000, b"fly-replay: instance=m1;" * 10_000, b"fly-replay: app=\xff"],
)
async def test_an_oversized_instruction_is_an_error_and_costs_nobody_else(edge: Edge, fields: bytes) -> None:
    machine = await edge.machine(
        answer=lambda r: b"HTTP/1.1 200 OK\r\n%b\r\nContent-Length: 0\r\n\r\n" % fields
    )
    await edge.start()
    client = await edge.client()
    response = await client.get()
    assert response.status == 502
    assert len(response.body) < 1_000
    machine.answer = lambda r: OK
    assert (await client.get()).status == 200


async def test_a_packed_instruction_is_not_unpacked(edge: Edge) -> None:
    head = b"Content-Type: application/vnd.fly.replay+json\r\nContent-Encoding: gzip\r\n"
    bomb = b"\x1f\x8b\x08" + b"\0" * 100
    await edge.machine(
        answer=lambda r: b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (head, len(bomb), bomb)
    )
    await edge.start()
    assert (await edge.get()).error == "PA03"


# Resources


@pytest.mark.parametrize("case", TOO_LARGE, ids=[repr(case.raw[:60]) for case in TOO_LARGE])
async def test_what_is_too_large_is_refused_and_never_held(edge: Edge, case: Case) -> None:
    machine = await edge.machine()
    await edge.start()
    client = await edge.client()
    client.send(case.raw)
    assert (await client.read_response()).status == case.status
    held = max((len(connection._buffer) for connection in edge.server._clients), default=0)
    assert held <= edge.settings.head_bytes_max
    assert machine.received == b""


async def test_clients_that_do_nothing_or_little_do_not_keep_others_waiting(edge: Edge) -> None:
    await edge.machine()
    await edge.start(head_timeout_s=30.0)
    idle = [await edge.client() for _ in range(300)]
    for number, client in enumerate(idle):
        client.send((b"", b"G", b"GET / HTTP/1.1\r\nHost: app", b"POST / HTTP/1.1\r\n")[number % 4])
    await wait_for(lambda: edge.metrics.connections_open == 300)
    assert [(await edge.get()).status for _ in range(20)] == [200] * 20


async def test_a_client_that_closes_its_side_before_its_answer_counts_as_gone(edge: Edge) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_request()
        await connection.read()

    machine = await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    client.send(get())
    await wait_for(lambda: bool(machine.received))
    client.writer.write_eof()
    assert await client.read_to_end() == b""
    await wait_for(lambda: edge.metrics.upstreams_open == 0 and edge.metrics.in_flight == 0)
    assert edge.metrics.aborted["client"] == 1


async def test_a_client_that_closes_its_side_gets_all_its_answers_where_that_is_allowed(edge: Edge) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def behave(connection: Connection) -> None:
        await connection.read_request()
        asked.set()
        await go_on.wait()
        connection.writer.write(OK)
        await connection.read_request()
        connection.writer.write(OK)
        await connection.read()

    await edge.machine(behave=behave)
    await edge.start(half_close=True)
    client = await edge.client()
    client.send(get() + get())
    await asked.wait()
    client.writer.write_eof()
    await asyncio.sleep(0.02)
    go_on.set()
    assert (await client.read_to_end()).count(b"HTTP/1.1 200 OK") == 2
    await wait_for(lambda: edge.metrics.connections_open == 0)


async def test_requests_that_wait_for_a_slow_reader_are_served_behind_its_end(edge: Edge) -> None:
    await edge.machine()
    await edge.start(half_close=True)
    client = await edge.client()
    await client.get()
    (downstream,) = edge.server._clients
    downstream.pause_writing()
    client.send(get() + get())
    client.writer.write_eof()
    await wait_for(lambda: downstream._half_closed)
    downstream.resume_writing()
    assert (await client.read_to_end()).count(b"HTTP/1.1 200 OK") == 2
    await wait_for(lambda: edge.metrics.connections_open == 0)


async def test_half_a_request_is_none_wherever_its_client_closes(edge: Edge) -> None:
    machine = await edge.machine()
    await edge.start(half_close=True)
    client = await edge.client()
    client.send(get()[:-2])
    client.writer.write_eof()
    assert await client.read_to_end() == b""
    assert not machine.received


async def test_what_clients_invent_makes_no_label(edge: Edge) -> None:
    await edge.machine()
    await edge.start()
    client = await edge.client()
    await client.get()
    client.send(get(line=b"NOSUCH / HTTP/1.1"))
    await client.read_response()
    client = await edge.client()
    client.send(get().replace(b"app.test", b"none.test"))
    await client.read_response()
    before = {(name, labels) for name, labels, _ in edge.metrics.samples()}
    for number in range(30):
        invented = b"x" * (number + 1)
        client = await edge.client()
        client.send(get(b"X-%b: %b\r\n" % (invented, invented), b"GET /%b HTTP/1.1" % invented))
        client.send(get().replace(b"app.test", invented + b".test"))
        client.send(get(line=b"%b / HTTP/1.1" % invented.upper()))
        assert [(await client.read_response()).status for _ in range(3)][:2] == [200, 404]
    assert {(name, labels) for name, labels, _ in edge.metrics.samples()} == before


# Clocks


async def test_a_jump_of_the_wall_clock_ends_no_wait(edge: Edge) -> None:
    go = asyncio.Event()

    async def behave(connection: Connection) -> None:
        for _ in range(2):
            await connection.read_request()
            await go.wait()
            connection.writer.write(OK)

    machine = await edge.machine(behave=behave)
    await edge.start(response_timeout_s=30.0)
    client = await edge.client()
    plane = edge.server._plane
    assert plane is not None
    wall_us = plane.wall_us
    for hours in (5, -5):
        client.send(get())
        count = len(machine.received)
        await wait_for(lambda count=count: len(machine.received) > count)
        plane.wall_us = lambda hours=hours: wall_us() + hours * 3_600_000_000
        await asyncio.sleep(3 * edge.settings.sweep_interval_s)
        go.set()
        assert (await client.read_response()).status == 200
        go.clear()
    assert len(machine.connections) == 1
