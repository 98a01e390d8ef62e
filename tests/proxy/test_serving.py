"""Requests through sockets: routing, heads, bodies, connections."""

from __future__ import annotations

import asyncio
import re
import socket
from typing import TYPE_CHECKING

import pytest

from tests.proxy.edge import Edge, wait_for

if TYPE_CHECKING:
    from tests.fakes.machine import Connection, Request


async def test_a_get_reaches_the_machine_of_its_host_and_the_answer_comes_back(edge: Edge) -> None:
    machine = await edge.machine(
        answer=lambda r: b"HTTP/1.1 201 Made\r\nX-App: 1\r\nContent-Length: 3\r\n\r\nabc"
    )
    await edge.start()
    response = await edge.get(b"/a/b?c=d", b"X-Own: 5")
    assert response.head.startswith(b"HTTP/1.1 201 Made\r\n")
    assert (response.body, response.values(b"x-app"), response.values(b"via")) == (
        b"abc",
        [b"1"],
        [b"1.1 isthmus"],
    )
    request = machine.requests[0]
    assert request.line == b"GET /a/b?c=d HTTP/1.1"
    assert request.values(b"host") == [b"app.test"]
    assert request.values(b"x-own") == [b"5"]


async def test_tells_the_machine_who_the_client_is(edge: Edge) -> None:
    machine = await edge.machine()
    await edge.start()
    response = await edge.get()
    request = machine.requests[0]
    port = str(edge.server.port).encode()
    expected = {
        b"Fly-Client-IP": b"127.0.0.1",
        b"Fly-Region": b"ams",
        b"Fly-Forwarded-Port": port,
        b"Fly-Forwarded-Proto": b"http",
        b"Fly-Forwarded-SSL": b"off",
        b"X-Forwarded-For": b"127.0.0.1",
        b"X-Forwarded-Port": port,
        b"X-Forwarded-Proto": b"http",
        b"X-Forwarded-SSL": b"off",
        b"Via": b"1.1 isthmus",
        b"Fly-Request-Id": response.values(b"fly-request-id")[0],
    }
    assert {name: request.values(name) for name in expected} == {n: [v] for n, v in expected.items()}
    assert re.fullmatch(rb"[0-9A-HJKMNP-TV-Z]{26}-ams", expected[b"Fly-Request-Id"])
    assert re.fullmatch(rb"t=\d{16}", request.values(b"x-request-start")[0])


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
async def test_a_client_of_ipv4_has_its_own_address_on_a_listener_of_both(edge: Edge) -> None:
    edge.listener = socket.socket(socket.AF_INET6)
    edge.listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    edge.listener.bind(("::", 0))
    edge.put_app("app", "app.test", options='{"proxy_protocol": "v1"}')
    machine = await edge.machine()
    await edge.start()
    client = await edge.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    await wait_for(lambda: bool(machine.connections) and b"\r\n\r\n" in machine.connections[0].received)
    received = machine.connections[0].received
    assert received.startswith(b"PROXY TCP4 127.0.0.1 127.0.0.1 ")
    assert b"\r\nFly-Client-IP: 127.0.0.1\r\n" in received
    assert b"\r\nX-Forwarded-For: 127.0.0.1\r\n" in received


@pytest.mark.parametrize(
    "name",
    [
        "Fly-Client-IP", "fly-region", "FLY-REQUEST-ID", "fly-replay-src", "fly-replay-failed",
        "Fly_Client_IP",
        "fly-preferred-instance-unavailable", "Fly-Forwarded-Proto", "X-Forwarded-For", "X_Forwarded_For",
        "X-Forwarded-Proto", "X-Forwarded-Host", "Forwarded", "X-Real-IP", "X-Request-Start", "fly-anything",
        "isthmus-node", "Keep-Alive", "Proxy-Connection", "Proxy-Authorization", "TE", "Trailer",
        "HTTP2-Settings", "Content_Length", "Transfer_Encoding",
    ],
)  # fmt: skip
async def test_what_a_client_says_of_itself_never_reaches_the_machine(edge: Edge, name: str) -> None:
    machine = await edge.machine()
    await edge.start()
    assert (await edge.get(b"/", name.encode() + b": 6.6.6.6")).status == 200
    assert b"6.6.6.6" not in machine.received


async def test_a_trusted_proxy_is_believed_down_the_chain(edge: Edge) -> None:
    machine = await edge.machine()
    await edge.start(trusted_proxies=("127.0.0.0/8", "10.0.0.0/8"))
    await edge.get(
        b"/",
        b"X-Forwarded-For: 6.6.6.6, 203.0.113.9, 10.1.1.1",
        b"X-Forwarded-Proto: https",
        b"X-Forwarded-Host: pub",
    )
    request = machine.requests[0]
    assert request.values(b"fly-client-ip") == [b"203.0.113.9"]
    assert request.values(b"x-forwarded-for") == [b"203.0.113.9, 10.1.1.1, 127.0.0.1"]
    assert request.values(b"x-forwarded-proto") == [b"https"]
    assert request.values(b"fly-forwarded-ssl") == [b"on"]
    assert request.values(b"x-forwarded-host") == [b"pub"]


async def test_fields_named_by_connection_end_here(edge: Edge) -> None:
    machine = await edge.machine(
        answer=lambda r: (
            b"HTTP/1.1 200 OK\r\nConnection: x-hop\r\nX-Hop: 1\r\nKeep-Alive: t\r\nContent-Length: 0\r\n\r\n"
        )
    )
    await edge.start()
    response = await edge.get(b"/", b"X-Hop: 6.6.6.6", b"Connection: x-hop, fly-client-ip", b"X-Stays: 1")
    assert b"6.6.6.6" not in machine.received
    assert machine.requests[0].values(b"x-stays") == [b"1"]
    assert machine.requests[0].values(b"fly-client-ip") == [b"127.0.0.1"]
    assert not response.values(b"x-hop")
    assert not response.values(b"connection")
    assert not response.values(b"keep-alive")


async def test_one_connection_on_each_side_carries_many_exchanges(edge: Edge) -> None:
    machine = await edge.machine()
    await edge.start()
    client = await edge.client()
    for _ in range(5):
        assert (await client.get()).body == b"ok"
    assert len(machine.connections) == 1
    assert edge.metrics.connections == 1


async def test_pipelined_requests_are_answered_in_order(edge: Edge) -> None:
    machine = await edge.machine(
        answer=lambda r: b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(r.line), r.line)
    )
    await edge.start()
    client = await edge.client()
    client.send(
        b"GET /1 HTTP/1.1\r\nHost: app.test\r\n\r\n"
        b"POST /2 HTTP/1.1\r\nHost: app.test\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
        b"GET /3 HTTP/1.1\r\nHost: nowhere.test\r\n\r\n"
        b"POST /4 HTTP/1.1\r\nHost: app.test\r\nContent-Length: 2\r\n\r\nxy"
        b"GET /5 HTTP/1.1\r\nHost: app.test\r\n\r\n"
    )
    answers = [await client.read_response() for _ in range(5)]
    assert [a.status for a in answers] == [200, 200, 404, 200, 200]
    assert [r.line.split()[1] for r in machine.requests] == [b"/1", b"/2", b"/4", b"/5"]
    assert [r.body for r in machine.requests] == [b"", b"abc", b"xy", b""]


@pytest.mark.parametrize("framing", [b"Content-Length: 300000", b"Transfer-Encoding: chunked"])
async def test_bodies_go_both_ways_whatever_their_framing(edge: Edge, framing: bytes) -> None:
    body = bytes(range(250)) * 1200
    machine = await edge.machine(
        answer=lambda r: (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
            % (len(r.body), r.body)
        )
    )
    await edge.start()
    client = await edge.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\n" + framing + b"\r\n\r\n")
    if b"chunked" in framing:
        for start in range(0, len(body), 7000):
            piece = body[start : start + 7000]
            client.send(b"%x;ext=1\r\n%b\r\n" % (len(piece), piece))
        client.send(b"0\r\nTrailer: dropped\r\n\r\n")
    else:
        client.send(body)
    assert (await client.read_response()).body == body
    assert machine.requests[0].body == body
    assert b"dropped" not in machine.received
    assert (await client.get()).status == 200


async def test_an_answer_that_ends_with_its_connection_is_chunked_for_the_client(edge: Edge) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(b"HTTP/1.1 200 OK\r\n\r\npart one, part two")

    await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    response = await client.get()
    assert response.values(b"transfer-encoding") == [b"chunked"]
    assert response.body == b"part one, part two"
    assert (await client.get()).status == 200


async def test_an_http_1_0_client_gets_no_chunks_and_the_end_by_close(edge: Edge) -> None:
    machine = await edge.machine(
        answer=lambda r: (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
        )
    )
    await edge.start()
    client = await edge.client()
    client.send(b"GET / HTTP/1.0\r\nHost: app.test\r\nConnection: keep-alive\r\n\r\n")
    data = await client.read_to_end()
    assert data.endswith(b"\r\n\r\nabcde")
    assert b"chunked" not in data
    assert b"Connection: close\r\n" in data
    assert machine.requests[0].values(b"via") == [b"1.0 isthmus"]


async def test_an_http_1_0_client_may_keep_its_connection(edge: Edge) -> None:
    await edge.machine()
    await edge.start()
    client = await edge.client()
    for _ in range(2):
        client.send(b"GET / HTTP/1.0\r\nHost: app.test\r\nConnection: keep-alive\r\n\r\n")
        assert (await client.read_response()).values(b"connection") == [b"keep-alive"]
    client.send(b"GET / HTTP/1.0\r\nHost: app.test\r\n\r\n")
    assert (await client.read_to_end()).endswith(b"ok")


async def test_http_1_0_without_a_host_is_for_the_app_of_any_host(edge: Edge) -> None:
    machine = await edge.machine()
    await edge.start()
    client = await edge.client()
    client.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert (await client.read_response()).status == 404
    edge.put_app("app", "*")
    client.send(b"GET / HTTP/1.0\r\n\r\n")
    assert (await client.read_to_end()).endswith(b"ok")
    assert machine.requests[0].values(b"host") == [b""]


async def test_answers_without_a_body_leave_the_connection_in_step(edge: Edge) -> None:
    def answer(request: Request) -> bytes:
        if request.line.startswith(b"HEAD"):
            return b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"
        if b"/304" in request.line:
            return b"HTTP/1.1 304 Not Modified\r\nContent-Length: 500\r\n\r\n"
        return b"HTTP/1.1 204 No Content\r\n\r\n"

    machine = await edge.machine(answer=answer)
    await edge.start()
    client = await edge.client()
    client.send(b"HEAD / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    response = await client.read_response(to_head=True)
    assert response.values(b"content-length") == [b"500"]
    assert (await client.get(b"/304")).status == 304
    response = await client.get(b"/204")
    assert (response.status, response.values(b"content-length")) == (204, [])
    assert len(machine.connections) == 1


async def test_early_hints_are_relayed_before_the_answer(edge: Edge) -> None:
    await edge.machine(
        answer=lambda r: (
            b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
        )
    )
    await edge.start()
    client = await edge.client()
    first = await client.get()
    assert (first.status, first.values(b"link")) == (103, [b"</a>"])
    assert (await client.read_response()).status == 200


async def test_an_expectation_is_met_by_the_machine(edge: Edge) -> None:
    async def behave(connection: Connection) -> None:
        head = await connection.read_until(b"\r\n\r\n")
        assert b"Expect: 100-continue\r\n" in head
        connection.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await connection.read_exactly(4)
        connection.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n" + body)

    await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    client.send(b"PUT / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
    assert (await client.read_response()).status == 100
    client.send(b"data")
    assert (await client.read_response()).body == b"data"


async def test_a_refused_expectation_closes_because_the_body_may_or_may_not_come(edge: Edge) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_until(b"\r\n\r\n")
        connection.writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await connection.read()

    await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    client.send(b"PUT / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
    response = await client.read_response()
    assert (response.status, response.values(b"connection")) == (413, [b"close"])


async def test_an_early_answer_spares_the_client_its_connection_but_not_the_machine(edge: Edge) -> None:
    async def behave(connection: Connection) -> None:
        while True:
            head = await connection.read_until(b"\r\n\r\n")
            connection.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            if b"POST" in head:
                await connection.read()

    machine = await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 10\r\n\r\n12345")
    assert (await client.read_response()).body == b"ok"
    client.send(b"67890")
    assert (await client.get()).body == b"ok"
    assert len(machine.connections) == 2


async def test_a_slow_reader_stops_the_machine_and_loses_nothing(edge: Edge) -> None:
    size = 40_000_000
    sent = 0

    async def behave(connection: Connection) -> None:
        nonlocal sent
        await connection.read_request()
        connection.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        connection.writer.transport.set_write_buffer_limits(65_536)
        for _ in range(size // 100_000):
            connection.writer.write(b"x" * 100_000)
            await connection.writer.drain()
            sent += 100_000

    await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    client.reader._limit = 1000  # the client's own stream stops reading
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    await wait_for(lambda: sent > 0)
    before = -1
    while before != sent:
        before = sent
        await asyncio.sleep(0.1)
    assert sent < size
    assert len(await client.read_body_of(size)) == size


async def test_a_slow_machine_stops_the_client(edge: Edge) -> None:
    release = asyncio.Event()
    size = 20_000_000

    async def behave(connection: Connection) -> None:
        await connection.read_until(b"\r\n\r\n")
        connection.reader._limit = 1000
        await release.wait()
        await connection.read_exactly(size)
        connection.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    machine = await edge.machine(behave=behave)
    edge.listener = socket.socket()
    edge.listener.bind(("127.0.0.1", 0))
    # By themselves they could grow until they take all. Connections have it from the socket that listens.
    for listening in (edge.listener, *machine._server.sockets):
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    await edge.start()
    client = await edge.client()
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    client.send(b"PUT / HTTP/1.1\r\nHost: app.test\r\nContent-Length: %d\r\n\r\n" % size)
    client.send(b"x" * size)
    before, left = -1, size
    while before != left:
        before = left
        await asyncio.sleep(0.1)
        left = client.writer.transport.get_write_buffer_size()
    assert left > 0
    release.set()
    assert (await client.read_response()).status == 200


async def test_a_client_that_leaves_takes_its_request_with_it(edge: Edge) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_request()
        await connection.read()

    machine = await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    await wait_for(lambda: bool(machine.received))
    target = edge.table.machine("m1")
    assert target is not None
    assert target.in_flight == 1
    client.close()
    await wait_for(lambda: machine.connections[0].closed)
    assert target.in_flight == 0
    assert edge.metrics.aborted["client"] == 1


async def test_to_http_1_0_an_answer_cut_short_ends_with_a_reset(edge: Edge) -> None:
    async def break_off(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        await seen.wait()

    seen = asyncio.Event()
    await edge.machine(behave=break_off)
    await edge.start()
    client = await edge.client()
    client.send(b"GET / HTTP/1.0\r\nHost: app.test\r\n\r\n")
    await client.reader.readuntil(b"\r\n\r\nhalf")
    seen.set()
    with pytest.raises(ConnectionResetError):
        await client.reader.read()


async def test_an_answer_cut_short_is_cut_for_the_client_too(edge: Edge) -> None:
    await edge.machine(
        behave=lambda c: _answer_once(
            c, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
        )
    )
    await edge.start()
    client = await edge.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    data = await client.read_to_end()
    assert data.endswith(b"5\r\nhello\r\n")
    assert edge.metrics.aborted["machine"] == 1


async def _answer_once(connection: Connection, data: bytes) -> None:
    await connection.read_request()
    connection.writer.write(data)


async def test_unknown_hosts_get_404_as_json_or_as_text(edge: Edge) -> None:
    await edge.machine()
    await edge.start()
    client = await edge.client()
    client.send(b"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n")
    response = await client.read_response()
    assert (response.status, response.error, response.json["error"]) == (404, "PH13", "PH13")
    assert response.json["request_id"].encode() == response.values(b"fly-request-id")[0]
    client.send(b"GET / HTTP/1.1\r\nHost: other.test\r\nAccept: text/html,*/*\r\n\r\n")
    response = await client.read_response()
    assert response.values(b"content-type") == [b"text/plain; charset=utf-8"]
    assert response.body.startswith(b"[PH13] ")


async def test_drain_ends_idle_connections_now_and_busy_ones_with_their_answer(edge: Edge) -> None:
    go = asyncio.Event()

    async def behave(connection: Connection) -> None:
        await connection.read_request()
        await go.wait()
        connection.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    machine = await edge.machine(behave=behave)
    await edge.start()
    idle, busy = await edge.client(), await edge.client()
    busy.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    await wait_for(lambda: bool(machine.received) and edge.metrics.connections == 2)
    drained = asyncio.create_task(edge.server.drain(5.0))
    assert await idle.read_to_end() == b""
    with pytest.raises(ConnectionRefusedError):
        await edge.client()
    go.set()
    assert (await busy.read_response()).values(b"connection") == [b"close"]
    assert await drained


async def test_drain_gives_up_after_its_time(edge: Edge) -> None:
    machine = await edge.machine(behave=lambda c: asyncio.sleep(60))
    await edge.start()
    client = await edge.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    await wait_for(lambda: bool(machine.connections))
    assert not await edge.server.drain(0.05)
