"""Upgraded connections through sockets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.proxy.edge import Edge, wait_for

if TYPE_CHECKING:
    from tests.fakes.client import RawClient
    from tests.fakes.machine import Connection

UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: app.test\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
SWITCHED = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Accept: x\r\n\r\n"
)


async def echo(connection: Connection) -> None:
    await connection.read_until(b"\r\n\r\n")
    connection.writer.write(SWITCHED + b"hello ")
    while data := await connection.read():
        connection.writer.write(data)
        await connection.writer.drain()


async def open_tunnel(edge: Edge, early: bytes = b"") -> RawClient:
    client = await edge.client()
    client.send(UPGRADE + early)
    response = await client.read_response()
    assert response.status == 101
    assert response.values(b"upgrade") == [b"websocket"]
    assert response.values(b"sec-websocket-accept") == [b"x"]
    return client


async def test_bytes_pass_both_ways_after_a_switch(edge: Edge) -> None:
    machine = await edge.machine(behave=echo)
    await edge.start()
    client = await open_tunnel(edge, b"early ")
    assert await client.read(12) == b"hello early "
    client.send(b"GET / HTTP/1.1\r\n\r\n")
    assert await client.read(18) == b"GET / HTTP/1.1\r\n\r\n"
    assert b"Connection: Upgrade\r\nUpgrade: websocket\r\n" in machine.received
    target = edge.table.machine("m1")
    assert target is not None
    assert target.in_flight == 1
    client.close()
    await wait_for(lambda: machine.connections[0].closed)
    assert target.in_flight == 0
    assert edge.metrics.in_flight == 0


async def test_the_end_of_the_machine_is_the_end_of_the_tunnel(edge: Edge) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_until(b"\r\n\r\n")
        connection.writer.write(SWITCHED + b"bye")

    await edge.machine(behave=behave)
    await edge.start()
    client = await open_tunnel(edge)
    assert await client.read_to_end() == b"bye"
    await wait_for(lambda: edge.metrics.connections_open == 0 and edge.metrics.upstreams_open == 0)


async def test_a_tunnel_holds_a_fast_side_back(edge: Edge) -> None:
    size = 30_000_000

    async def behave(connection: Connection) -> None:
        await connection.read_until(b"\r\n\r\n")
        connection.writer.write(SWITCHED)
        connection.reader._limit = 1000
        await release.wait()
        await connection.read_exactly(size)
        connection.writer.write(b"all of it")

    release = asyncio.Event()
    await edge.machine(behave=behave)
    await edge.start()
    client = await open_tunnel(edge)
    client.send(b"x" * size)
    before, left = -1, size
    while before != left:
        before = left
        await asyncio.sleep(0.1)
        left = client.writer.transport.get_write_buffer_size()
    assert left > 0
    release.set()
    assert await client.read(9) == b"all of it"


async def test_an_idle_tunnel_ends(edge: Edge) -> None:
    await edge.machine(behave=echo)
    await edge.start(tunnel_timeout_s=0.05)
    client = await open_tunnel(edge)
    assert await client.read_to_end() == b"hello "


async def test_a_refused_upgrade_is_an_ordinary_answer(edge: Edge) -> None:
    machine = await edge.machine(
        answer=lambda r: b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 2\r\n\r\nno"
    )
    await edge.start()
    client = await edge.client()
    for _ in range(2):
        client.send(UPGRADE)
        response = await client.read_response()
        assert (response.status, response.body) == (426, b"no")
    assert len(machine.connections) == 1


async def test_a_switch_to_something_else_is_no_tunnel(edge: Edge) -> None:
    await edge.machine(answer=lambda r: SWITCHED.replace(b"websocket", b"other"))
    await edge.start()
    client = await edge.client()
    client.send(UPGRADE)
    assert (await client.read_response()).error == "PU02"


async def test_a_replayed_upgrade_switches_at_its_target(edge: Edge) -> None:
    await edge.machine(
        "m1",
        region="ams",
        answer=lambda r: (
            b"HTTP/1.1 307 Go\r\nfly-replay: instance=m2\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        ),
    )
    await edge.machine("m2", region="gru", behave=echo)
    await edge.start()
    client = await open_tunnel(edge)
    assert await client.read(6) == b"hello "
