"""Bytes that two parsers may read in two ways: refused by the proxy, and nothing of them forwarded.

The bytes are in tests/hostile; each is one that real servers have been attacked with, or a neighbour of one.
"""

from __future__ import annotations

import asyncio

import pytest

from tests.fakes.machine import OK, Connection
from tests.hostile import answers
from tests.hostile.requests import BROKEN_CHUNKS, CHUNKED, CL, NEXT, REFUSED, SERVED, Case, get, post
from tests.proxy.edge import Edge, wait_for


def names(cases: list[Case] | list[answers.Answer]) -> list[str]:
    return [f"{case.about}: {case.raw[:80]!a}" for case in cases]


@pytest.mark.parametrize("case", REFUSED, ids=names(REFUSED))
async def test_refuses_closes_and_forwards_nothing(edge: Edge, case: Case) -> None:
    machine = await edge.machine()
    await edge.start()
    client = await edge.client()
    client.send(case.raw)
    response = await client.read_response()
    assert (response.status, response.values(b"connection")) == (case.status, [b"close"])
    assert response.error.startswith("PH")
    assert await client.read_to_end() == b""
    assert machine.received == b""
    assert sum(edge.metrics.errors.values()) == 1


@pytest.mark.parametrize("case", REFUSED, ids=names(REFUSED))
async def test_refuses_the_same_behind_a_request_that_is_served(edge: Edge, case: Case) -> None:
    machine = await edge.machine()
    await edge.start()
    client = await edge.client()
    # A blank line in front is forgiven once; the corpus says what comes of a second one.
    client.send(get() + case.raw)
    assert (await client.read_response()).status == 200
    assert (await client.read_response()).status == case.status
    assert await client.read_to_end() == b""
    assert len(machine.requests) == 1


@pytest.mark.parametrize("case", SERVED, ids=names(SERVED))
async def test_serves_what_is_odd_and_clear(edge: Edge, case: Case) -> None:
    machine = await edge.machine()
    edge.put_app("other", "other.test")
    await edge.start()
    client = await edge.client()
    client.send(case.raw)
    to_head = case.raw.startswith(b"HEAD")
    response = await client.read_response(to_head=to_head)
    if response.status == 100:
        response = await client.read_response()
    assert response.status == 200
    for request in machine.requests:
        assert len(request.values(b"host")) == 1
        assert len(request.values(b"content-length") + request.values(b"transfer-encoding")) <= 1
        assert request.values(b"fly-client-ip") == request.values(b"x-forwarded-for") == [b"127.0.0.1"]
        assert b"6.6.6.6" not in request.head
        assert not request.values(b"upgrade")
        assert request.trailers == b""
        assert b"other.test" not in request.head


@pytest.mark.parametrize("case", BROKEN_CHUNKS, ids=names(BROKEN_CHUNKS))
async def test_a_broken_chunked_body_ends_both_connections(edge: Edge, case: Case) -> None:
    machine = await edge.machine()
    await edge.start()
    client = await edge.client()
    client.send(post(CHUNKED))
    client.send(case.raw + NEXT)
    response = await client.read_response()
    assert (response.status, response.error) == (400, "PH10")
    assert machine.requests == []
    assert b"smuggled" not in machine.received
    await wait_for(lambda: edge.metrics.upstreams_open == 0)


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


@pytest.mark.parametrize("answer", answers.BROKEN, ids=names(answers.BROKEN))
async def test_a_broken_answer_becomes_502_and_its_connection_is_closed(
    edge: Edge, answer: answers.Answer
) -> None:
    await edge.machine(answer=lambda r: answer.raw)
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
