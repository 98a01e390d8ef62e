"""Bytes that two parsers may read in two ways: refused by the proxy, and nothing of them forwarded.

Rows refer to RFC 9112; each input is one that real servers have been attacked with.
"""

from __future__ import annotations

import asyncio

import pytest

from tests.fakes.machine import OK, Connection
from tests.proxy.edge import Edge, wait_for

HOST = b"Host: app.test\r\n"
NEXT = b"GET /smuggled HTTP/1.1\r\nHost: app.test\r\n\r\n"


def post(lines: bytes, body: bytes = b"") -> bytes:
    return b"POST / HTTP/1.1\r\n" + HOST + lines + b"\r\n" + body


def get(lines: bytes = b"", line: bytes = b"GET / HTTP/1.1") -> bytes:
    return line + b"\r\n" + HOST + lines + b"\r\n"


CL, TE = b"Content-Length: ", b"Transfer-Encoding: "
CHUNKED = TE + b"chunked\r\n"

REFUSED = [
    # Content-Length and Transfer-Encoding together
    (400, post(CL + b"5\r\n" + CHUNKED, b"0\r\n\r\n" + NEXT)),
    (400, post(CHUNKED + CL + b"5\r\n", b"0\r\n\r\n" + NEXT)),
    # Content-Length that is repeated, or no plain number
    (400, post(CL + b"5\r\n" + CL + b"6\r\n", b"hello" + NEXT)),
    (400, post(CL + b"5\r\n" + CL + b"5\r\n", b"hello" + NEXT)),
    *((400, post(CL + v + b"\r\n", b"hello" + NEXT)) for v in (
        b"5, 5", b"5, 6", b"+5", b"0x5", b" 5 ", b"5 ", b" 5", b"\t5", b"-1", b"5.0", b"5" * 20, b"",
        b"5 5", b"5;",
    )),
    # Transfer-Encoding that is not exactly `chunked`
    *((501, post(TE + v + b"\r\n", b"0\r\n\r\n" + NEXT)) for v in (
        b"xchunked", b"identity", b"gzip, chunked", b",chunked", b'"chunked"', b"chunked;q=1", b"gzip",
    )),
    *((400, post(TE + v + b"\r\n", b"0\r\n\r\n" + NEXT)) for v in (
        b"chunked, identity", b"chunked, chunked", b"chunked ", b" chunked", b"\tchunked", b"chunked\t", b"",
    )),
    (400, post(CHUNKED + CHUNKED, b"0\r\n\r\n" + NEXT)),
    (400, post(TE + b"identity\r\n" + CHUNKED, b"0\r\n\r\n" + NEXT)),
    (400, b"POST / HTTP/1.0\r\n" + HOST + CHUNKED + b"\r\n0\r\n\r\n" + NEXT),
    (400, post(CHUNKED + b"Connection: Transfer-Encoding\r\n", b"0\r\n\r\n" + NEXT)),
    (400, post(CL + b"5\r\nConnection: close, content-length\r\n", b"hello" + NEXT)),
    # Bytes that do not belong
    (400, get(b"A: b\nX: y\r\n")),
    (400, b"GET / HTTP/1.1\nHost: app.test\n\n"),
    (400, b"GET / HTTP/1.1\r\nHost: app.test\n\r\n"),
    *((400, get(b"A: b" + c + b"X: y\r\n")) for c in (b"\r", b"\0", b"\x01", b"\x0b", b"\x7f")),
    *((400, get(c + b"A: b\r\n")) for c in (b"\0", b"\x01", b"(", b"\xc3\xa9", b"\t")),
    (400, get(b"A: b\r\n c\r\n")),
    (400, get(b"A : b\r\n")),
    (400, get(b"A\r\n")),
    (400, get(b": b\r\n")),
    (400, b"GET / HTTP/1.1\r\n Host: app.test\r\n\r\n"),
    (400, b"\r\n\r\n" + get()),
    (400, b"\n" + get()),
    (400, b" " + get()),
    # Request lines
    *((400, get(line=line)) for line in (
        b"GET  / HTTP/1.1", b"GET /\tHTTP/1.1", b"GET / HTTP/1.1 ", b"GET /a b HTTP/1.1",
        b"GET /\x01 HTTP/1.1",
        b"GET /\xe9 HTTP/1.1", b"GET /a#b HTTP/1.1", b"GET b HTTP/1.1", b"GET * HTTP/1.1", b"GET ?x HTTP/1.1",
        b"GET http://u@app.test/ HTTP/1.1", b"GET http:///x HTTP/1.1", b"GET ftp://app.test/ HTTP/1.1",
    )),
    *((505, get(line=line)) for line in (
        b"GET / HTTP/0.9", b"GET / HTTP/1.2", b"GET / HTTP/2.0", b"GET / http/1.1", b"DESCRIBE / RTSP/1.0",
        b"PRI * HTTP/2.0",
    )),
    (400, b"GET /\r\n\r\n"),
    *((405, get(line=line)) for line in (
        b"CONNECT app.test:80 HTTP/1.1", b"TRACE / HTTP/1.1", b"get / HTTP/1.1", b"NOSUCH / HTTP/1.1",
    )),
    # Host
    (400, b"GET / HTTP/1.1\r\n\r\n"),
    (400, get(b"Host: app.test\r\n")),
    *((400, b"GET / HTTP/1.1\r\nHost: " + h + b"\r\n\r\n") for h in (
        b"u@app.test", b"app.test/x", b"app.test,other.test", b"app.test:x", b"app.test:123456", b"",
        b"app test",
        b"[::1", b"app.test?x",
    )),
    (417, post(CL + b"5\r\nExpect: something\r\n", b"hello")),
    (400, get(b"Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 3\r\n") + b"abc"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "raw"), REFUSED, ids=[ascii(raw[:70]) for _, raw in REFUSED])
async def test_refuses_closes_and_forwards_nothing(edge: Edge, status: int, raw: bytes) -> None:
    machine = await edge.machine()
    await edge.start()
    client = await edge.client()
    client.send(raw)
    response = await client.read_response()
    assert (response.status, response.values(b"connection")) == (status, [b"close"])
    assert response.error.startswith("PH")
    assert await client.read_to_end() == b""
    assert machine.received == b""
    assert sum(edge.metrics.errors.values()) == 1


BAD_BODIES = [
    b"0x5\r\nhello\r\n0\r\n\r\n", b"+5\r\nhello\r\n0\r\n\r\n", b"-0\r\n\r\n", b"1" * 17 + b"\r\n",
    b"\r\nhello",
    b" 5\r\nhello\r\n0\r\n\r\n", b"5 \r\nhello\r\n0\r\n\r\n", b"5 ;a\r\nhello\r\n0\r\n\r\n",
    b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    b"5;a\nb\r\nhello\r\n0\r\n\r\n", b"5;a\0b\r\nhello\r\n0\r\n\r\n", b"5;" + b"a" * 100_000,
    b"5\nhello\r\n0\r\n\r\n",
    b"5\rhello\r\n0\r\n\r\n", b"5\r\nhelloXX0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n",
    b"5\r\nhello\r\n0\r\nX\r\n\r\n",
    b"5\r\nhello\r\n0\r\n\n", b"5\r\nhello\r\n0\r\nA : b\r\n\r\n", b"0\r\nA: b\r\n c\r\n\r\n",
    b"0\r\n" + b"A: b\r\n" * 2000,
    b"1\r\nx\r\n" * 10_000,
]  # fmt: skip


@pytest.mark.parametrize("body", BAD_BODIES, ids=[ascii(body[:40]) for body in BAD_BODIES])
async def test_a_broken_chunked_body_ends_both_connections(edge: Edge, body: bytes) -> None:
    machine = await edge.machine()
    await edge.start()
    client = await edge.client()
    client.send(post(CHUNKED))
    client.send(body + NEXT)
    response = await client.read_response()
    assert (response.status, response.error) == (400, "PH10")
    assert machine.requests == []
    assert b"smuggled" not in machine.received


@pytest.mark.parametrize(
    ("target", "host", "expected"),
    [
        (b"http://app.test/x?y", b"other.test", b"GET /x?y HTTP/1.1\r\nHost: app.test\r\n"),
        (b"HTTP://app.test:80", b"other.test", b"GET / HTTP/1.1\r\nHost: app.test:80\r\n"),
        (b"http://app.test?q", b"other.test", b"GET /?q HTTP/1.1\r\nHost: app.test\r\n"),
    ],
)
async def test_the_authority_of_an_absolute_target_wins_everywhere(
    edge: Edge, target: bytes, host: bytes, expected: bytes
) -> None:
    machine = await edge.machine()
    await edge.start()
    response = await edge.exchange(b"GET %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (target, host))
    assert response.status == 200
    assert machine.received.startswith(expected)
    assert b"other.test" not in machine.received


@pytest.mark.parametrize(
    "path", [b"/a%2Fb", b"/a/../b", b"//x", b"/%2e%2e/x", b"/a\\b", b"/%00", b"/?a=/../b", b'/"<>^`{|}']
)
async def test_paths_are_forwarded_as_they_came(edge: Edge, path: bytes) -> None:
    machine = await edge.machine()
    await edge.start()
    assert (await edge.get(path)).status == 200
    assert machine.requests[0].line == b"GET " + path + b" HTTP/1.1"


async def test_values_beyond_ascii_and_one_empty_line_before_are_fine(edge: Edge) -> None:
    machine = await edge.machine()
    await edge.start()
    response = await edge.exchange(b"\r\n" + get(b"X-A: \xe9\xff\tx \t\r\nX-Empty:\r\n"))
    assert response.status == 200
    assert machine.requests[0].values(b"x-a") == [b"\xe9\xff\tx"]


async def test_a_get_with_a_body_is_framed_and_its_connection_not_used_again(edge: Edge) -> None:
    machine = await edge.machine()
    await edge.start()
    client = await edge.client()
    client.send(get(CL + b"3\r\n") + b"abc" + NEXT)
    assert [(await client.read_response()).status for _ in range(2)] == [200, 200]
    assert machine.requests[0].body == b"abc"
    assert len(machine.connections) == 2


async def test_h2c_is_never_offered_to_a_machine(edge: Edge) -> None:
    machine = await edge.machine()
    await edge.start()
    lines = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    assert (await edge.exchange(get(lines))).status == 200
    assert b"h2c" not in machine.received
    assert b"upgrade" not in machine.received.lower()
    assert b"http2" not in machine.received.lower()


BAD_ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 204 No\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 204 No\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 101 Switching\r\n\r\n",
    b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 100 + OK,
    b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 999 No\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 099 No\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 O\x01K\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\nContent-Length: 0\n\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nA: b\0\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nA : b\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000,
    b"nonsense\r\n\r\n",
]


@pytest.mark.parametrize("answer", BAD_ANSWERS, ids=[ascii(answer[:80]) for answer in BAD_ANSWERS])
async def test_a_broken_answer_becomes_502_and_its_connection_is_closed(edge: Edge, answer: bytes) -> None:
    await edge.machine(answer=lambda r: answer)
    await edge.start()
    client = await edge.client()
    response = await client.get()
    assert (response.status, response.error) == (502, "PU02")
    assert (await client.get()).status == 502
    assert edge.metrics.upstreams == 2


async def test_what_follows_a_complete_answer_goes_to_nobody(edge: Edge) -> None:
    poison = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"
    machine = await edge.machine(answer=lambda r: OK + poison)
    await edge.start()
    client = await edge.client()
    for _ in range(3):
        assert (await client.get()).body == b"ok"
    assert len(machine.connections) == 3


async def test_an_answer_before_its_request_goes_to_nobody(edge: Edge) -> None:
    answered = asyncio.Event()

    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(OK)
        await answered.wait()
        connection.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")
        await connection.read()

    machine = await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    assert (await client.get()).body == b"ok"
    answered.set()
    await wait_for(lambda: edge.metrics.upstreams_open == 0)
    assert (await client.get()).body == b"ok"
    assert len(machine.connections) == 2


async def test_extra_bytes_behind_an_answer_without_a_body_poison_nobody(edge: Edge) -> None:
    machine = await edge.machine(
        answer=lambda r: b"HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n"
    )
    await edge.start()
    client = await edge.client()
    assert [(await client.get()).status for _ in range(2)] == [304, 304]
    assert len(machine.connections) == 2
