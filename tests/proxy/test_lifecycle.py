"""A server that drains, and one that goes on with other settings."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from proxy.access_log import AccessLog
from tests.proxy.edge import wait_for

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fakes.machine import Connection
    from tests.proxy.edge import Edge

GET = b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n"


async def test_a_request_on_an_idle_connection_is_answered_while_draining(edge: Edge) -> None:
    await edge.machine()
    await edge.start()
    used, fresh = await edge.client(), await edge.client()
    assert (await used.get()).status == 200
    await wait_for(lambda: edge.metrics.connections_open == 2)
    drained = asyncio.create_task(edge.server.drain(20.0, 10.0))
    await wait_for(lambda: edge.server._plane.draining)
    for client in (used, fresh):
        response = await client.get()
        assert (response.status, response.values(b"connection")) == (200, [b"close"])
        assert await client.read_to_end() == b""
    assert await drained


async def test_idle_connections_are_closed_when_their_time_is_over(edge: Edge) -> None:
    await edge.machine()
    await edge.start()
    client = await edge.client()
    await client.get()
    assert await edge.server.drain(20.0, 0.05)
    assert await client.read_to_end() == b""


async def test_an_answer_that_said_keep_alive_before_the_drain_keeps_its_word(edge: Edge) -> None:
    go = asyncio.Event()

    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
        await go.wait()
        connection.writer.write(b"k")
        await connection.read_request()
        connection.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nagain")

    await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    client.send(GET)
    await client.reader.readuntil(b"\r\n\r\no")
    drained = asyncio.create_task(edge.server.drain(20.0, 10.0))
    await wait_for(lambda: edge.server._plane.draining)
    go.set()
    assert await client.reader.readexactly(1) == b"k"
    response = await client.get()
    assert (response.body, response.values(b"connection")) == (b"again", [b"close"])
    assert await drained


async def test_connections_that_the_kernel_has_accepted_are_served(edge: Edge) -> None:
    await edge.machine()
    await edge.start()
    # Without a turn of the event loop in between: the proxy has seen none of these when it stops accepting.
    waiting = [socket.create_connection(("127.0.0.1", edge.server.port)) for _ in range(5)]
    drained = asyncio.create_task(edge.server.drain(20.0, 10.0))
    for sock in waiting:
        reader, writer = await asyncio.open_connection(sock=sock)
        writer.write(GET)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()
        await writer.wait_closed()
    assert await drained
    with pytest.raises(ConnectionRefusedError):
        await edge.client()


async def test_other_limits_hold_from_the_next_request_on(edge: Edge) -> None:
    await edge.machine()
    await edge.start()
    client = await edge.client()
    assert (await client.get(b"/" + b"x" * 100)).status == 200
    await edge.server.adopt(replace(edge.settings, url_bytes_max=50, connections_per_client_max=1), None)
    refused = await edge.client()
    assert (await refused.read_response()).status == 429
    assert (await client.get(b"/" + b"x" * 100)).status == 414


async def test_a_proxy_is_trusted_from_its_next_connection_on(edge: Edge) -> None:
    machine = await edge.machine()
    await edge.start()
    said = b"X-Forwarded-For: 203.0.113.9"
    before = await edge.client()
    await before.get(b"/1", said)
    await edge.server.adopt(replace(edge.settings, trusted_proxies=("127.0.0.0/8",)), None)
    await before.get(b"/2", said)
    after = await edge.client()
    await after.get(b"/3", said)
    clients = [request.values(b"fly-client-ip") for request in machine.requests]
    assert clients == [[b"127.0.0.1"], [b"127.0.0.1"], [b"203.0.113.9"]]


async def test_announced_clients_are_believed_once_that_is_set(edge: Edge) -> None:
    machine = await edge.machine()
    await edge.start()
    await edge.server.adopt(replace(edge.settings, proxy_protocol_from=("127.0.0.0/8",)), None)
    client = await edge.client()
    client.send(b"PROXY TCP4 203.0.113.9 127.0.0.1 1234 80\r\n")
    await client.get()
    assert machine.requests[0].values(b"fly-client-ip") == [b"203.0.113.9"]


async def test_the_access_log_is_switched_on_changed_and_off(edge: Edge, tmp_path: Path) -> None:
    go = asyncio.Event()

    async def behave(connection: Connection) -> None:
        while request := await connection.read_request():
            if b"/slow" in request.line:
                await go.wait()
            connection.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    await edge.machine(behave=behave)
    await edge.start()
    client, slow = await edge.client(), await edge.client()
    await client.get(b"/unlogged")
    log = AccessLog(str(tmp_path / "log"), "combined", 1, edge.metrics)
    await edge.server.adopt(edge.settings, log)
    await client.get(b"/logged")
    slow.send(b"GET /slow HTTP/1.1\r\nHost: app.test\r\n\r\n")
    await wait_for(lambda: edge.metrics.in_flight == 1)
    await edge.server.adopt(edge.settings, None)
    log.close()
    go.set()
    assert (await slow.read_response()).status == 200
    assert (await slow.get(b"/unlogged-too")).status == 200
    await client.get(b"/unlogged-again")
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 1
    assert "GET /logged HTTP/1.1" in lines[0]


async def test_bounds_of_retries_and_of_remembered_replays_change_while_it_serves(edge: Edge) -> None:
    refused = await edge.machine("m1", region="ams")
    await edge.machine("m2", region="gru")
    await edge.start()
    await edge.server.adopt(
        replace(edge.settings, retry_percent=0, retries_per_s_min=0, replay_cache_entries_max=0), None
    )
    await refused.stop()
    # What a new worker starts with is lost after the window; until then it may be used.
    plane = edge.server._plane
    assert plane is not None
    while plane.retries.take("app", plane.now()):
        pass
    assert (await edge.get()).error == "PR03"
    assert plane.replay_cache._entries_max == 0
