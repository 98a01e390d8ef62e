"""fly-replay through sockets: where the request goes, what it carries, and when it is refused."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.fakes.machine import OK, Connection, Request
from tests.proxy.edge import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.proxy.edge import Edge


def replay(instruction: bytes, body: bytes = b"") -> Callable[[Request], bytes]:
    return lambda r: (
        b"HTTP/1.1 409 Conflict\r\nfly-replay: %b\r\nContent-Length: %d\r\n\r\n%b"
        % (
            instruction,
            len(body),
            body,
        )
    )


def replay_json(**instruction: object) -> Callable[[Request], bytes]:
    body = json.dumps(instruction).encode()
    return lambda r: (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.fly.replay+json\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body)
    )


def named(name: bytes) -> Callable[[Request], bytes]:
    return lambda r: b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(name), name)


@pytest.mark.parametrize("form", ["header", "json"])
async def test_the_whole_request_goes_to_the_machine_asked_for(edge: Edge, form: str) -> None:
    source = await edge.machine("m1", region="ams")
    target = await edge.machine("m2", region="gru", answer=named(b"from m2"))
    source.answer = (
        replay(b"instance=m2;state=a b".replace(b"a b", b'"a;b"'), b"dropped")
        if form == "header"
        else replay_json(instance="m2", state="a;b")
    )
    await edge.start()
    client = await edge.client()
    client.send(b"PUT /x?y HTTP/1.1\r\nHost: app.test\r\nX-Own: 1\r\nContent-Length: 5\r\n\r\nhello")
    response = await client.read_response()
    assert (response.status, response.body, response.values(b"fly-replay")) == (200, b"from m2", [])
    request = target.requests[0]
    assert (request.line, request.body) == (b"PUT /x?y HTTP/1.1", b"hello")
    assert request.values(b"x-own") == [b"1"]
    assert re.fullmatch(rb"instance=m1;region=ams;t=\d{16};state=a%3Bb", request.values(b"fly-replay-src")[0])
    assert edge.metrics.app("app").replays == 1
    assert all(t.in_flight == 0 for t in edge.table.targets())


async def test_a_chunked_body_still_on_its_way_follows_the_replay(edge: Edge) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_until(b"hello\r\n")
        connection.writer.write(replay(b"instance=m2")(Request(b"", b"")))
        await connection.read()

    source = await edge.machine("m1", region="ams", behave=behave)
    target = await edge.machine("m2", region="gru", answer=lambda r: named(r.body)(r))
    await edge.start()
    client = await edge.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    await wait_for(lambda: bool(target.connections))
    client.send(b"6\r\n world\r\n0\r\n\r\n")
    assert (await client.read_response()).body == b"hello world"
    assert source.requests == []


@pytest.mark.parametrize(
    ("framing", "first", "rest", "status"),
    [
        (b"Content-Length: 5", b"hello", b"", 200),
        (b"Content-Length: 6", b"hello!", b"", 413),
        (b"Content-Length: 6", b"he", b"", 413),
        (b"Transfer-Encoding: chunked", b"2\r\nhe\r\n", b"3\r\nllo\r\n0\r\n\r\n", 200),
        (b"Transfer-Encoding: chunked", b"2\r\nhe\r\n", b"4\r\nllo!\r\n0\r\n\r\n", 413),
        (b"Transfer-Encoding: chunked", b"6\r\nhello!\r\n0\r\n\r\n", b"", 413),
    ],
)
async def test_the_target_has_its_own_limit_of_bodies(
    edge: Edge, framing: bytes, first: bytes, rest: bytes, status: int
) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_until(b"he")
        connection.writer.write(replay(b"app=small")(Request(b"", b"")))
        await connection.read()

    await edge.machine("m1", behave=behave)
    edge.put_app("small", "small.test", options='{"body_bytes_max": 5}')
    target = await edge.machine("m2", app="small", answer=lambda r: named(r.body)(r))
    await edge.start()
    client = await edge.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\n%b\r\n\r\n%b" % (framing, first))
    if rest:
        await wait_for(lambda: bool(target.connections))
        client.send(rest)
    response = await client.read_response()
    assert response.status == status
    assert (response.body == b"hello") is (status == 200)
    assert response.error == ("" if status == 200 else "PH14")
    assert len(target.requests) == (status == 200)
    await wait_for(lambda: edge.metrics.in_flight == 0)


@pytest.mark.parametrize(
    ("instruction", "status", "code"),
    [
        (b"instance=m2;junk=1", 502, "PA03"),
        (b"app=nowhere", 502, "PA04"),
        (b"app=foreign", 502, "PA05"),
        (b"region=xyz", 502, "PA03"),
        (b"instance=nobody", 502, "PR02"),
        (b"instance=foreign1", 502, "PA03"),
        (b"instance=m1\tx", 502, "PA03"),
    ],
)
async def test_an_instruction_that_cannot_be_done_is_an_error_with_its_code(
    edge: Edge, instruction: bytes, status: int, code: str
) -> None:
    machine = await edge.machine("m1")
    edge.put_app("foreign", "foreign.test", network="other")
    await edge.machine("foreign1", app="foreign")
    machine.answer = replay(instruction)
    await edge.start()
    response = await edge.get()
    assert (response.status, response.error) == (status, code)


async def test_two_instructions_in_one_answer_are_none(edge: Edge) -> None:
    await edge.machine(
        "m1",
        answer=lambda r: (
            b"HTTP/1.1 200 OK\r\nfly-replay: app=a\r\nfly-replay: app=b\r\nContent-Length: 0\r\n\r\n"
        ),
    )
    await edge.start()
    assert (await edge.get()).error == "PA03"


async def test_a_json_instruction_is_bounded(edge: Edge) -> None:
    await edge.machine("m1", answer=replay_json(app="x" * 70_000))
    await edge.start()
    response = await edge.get()
    assert (response.status, response.error) == (502, "PA03")
    assert "65536" in response.json["message"]


async def test_a_loop_ends_after_ten_replays(edge: Edge) -> None:
    machine = await edge.machine("m1", answer=replay(b"instance=m1"))
    await edge.start()
    response = await edge.get()
    assert (response.status, response.error) == (508, "PA02")
    assert len(machine.requests) == 11


async def test_a_body_beyond_the_buffer_cannot_be_replayed(edge: Edge) -> None:
    await edge.machine("m1", region="ams", answer=replay(b"region=gru"))
    await edge.machine("m2", region="gru")
    await edge.start(replay_body_bytes_max=1000)
    client = await edge.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 2000\r\n\r\n" + b"x" * 2000)
    response = await client.read_response()
    assert (response.status, response.error) == (413, "PA01")


async def test_elsewhere_leaves_the_machine_out(edge: Edge) -> None:
    first = await edge.machine("m1", region="ams", answer=replay(b"elsewhere=true"))
    await edge.machine("m2", region="gru", answer=named(b"m2"))
    await edge.start()
    assert (await edge.get()).body == b"m2"
    assert len(first.requests) == 1


async def test_a_replay_beats_what_the_client_asked_for(edge: Edge) -> None:
    await edge.machine("m1", region="ams", answer=replay(b"instance=m2"))
    target = await edge.machine("m2", region="gru", answer=named(b"m2"))
    await edge.start()
    assert (await edge.get(b"/", b"fly-force-instance-id: m1")).body == b"m2"
    assert target.requests[0].values(b"fly-force-instance-id") == []


@pytest.mark.parametrize("fallback", [b"force_self", b"prefer_self"])
async def test_a_replay_that_reaches_nobody_falls_back_to_who_asked(edge: Edge, fallback: bytes) -> None:
    source = await edge.machine("m1", region="ams")
    dead = await edge.machine("m2", region="gru")
    await dead.stop()

    def answer(request: Request) -> bytes:
        failed = request.values(b"fly-replay-failed")
        return named(failed[0])(request) if failed else replay(b"instance=m2;fallback=" + fallback)(request)

    source.answer = answer
    await edge.start()
    response = await edge.get()
    assert response.status == 200
    assert re.fullmatch(
        rb"instance=m2;replay_source=m1;reason=retries_exhausted;elapsed_ms=\d+", response.body
    )


async def test_a_fallback_cannot_be_replayed_again(edge: Edge) -> None:
    machine = await edge.machine("m1", answer=replay(b"instance=nobody;fallback=force_self"))
    await edge.start()
    assert (await edge.get()).error == "PA03"
    assert len(machine.requests) == 2


async def test_replay_fields_of_an_answer_are_for_the_proxy_alone(edge: Edge) -> None:
    await edge.machine(
        "m1",
        answer=lambda r: (
            b"HTTP/1.1 200 OK\r\nfly-replay-cache: /x\r\nFly-Replay-Foo: 1\r\nContent-Length: 0\r\n\r\n"
        ),
    )
    await edge.start()
    assert b"replay" not in (await edge.get()).head.lower()


async def test_clients_may_ask_for_a_machine_or_a_region(edge: Edge) -> None:
    await edge.machine("m1", region="ams", answer=named(b"m1"))
    m2 = await edge.machine("m2", region="gru", answer=named(b"m2"))
    edge.put_app("other", "other.test")
    await edge.machine("o1", app="other")
    await edge.start()
    assert (await edge.get()).body == b"m1"
    assert (await edge.get(b"/", b"fly-prefer-region: gru")).body == b"m2"
    assert (await edge.get(b"/", b"fly-force-region: gru")).body == b"m2"
    assert (await edge.get(b"/", b"fly-prefer-region: nrt")).body == b"m1"
    assert (await edge.get(b"/", b"fly-force-region: nrt")).status == 503
    assert (await edge.get(b"/", b"fly-prefer-instance-id: m2")).body == b"m2"
    assert (await edge.get(b"/", b"fly-force-instance-id: m2")).body == b"m2"
    assert (await edge.get(b"/", b"fly-force-instance-id: o1")).error == "PR02"
    assert (await edge.get(b"/", b"fly-force-region: ;")).error == "PH12"
    assert m2.requests[-1].values(b"fly-force-instance-id") == []


async def test_a_preferred_machine_that_is_gone_is_named_to_its_stand_in(edge: Edge) -> None:
    machine = await edge.machine("m1", answer=lambda r: OK)
    await edge.start()
    assert (await edge.get(b"/", b"fly-prefer-instance-id: gone")).status == 200
    assert machine.requests[0].values(b"fly-preferred-instance-unavailable") == [b"gone"]
