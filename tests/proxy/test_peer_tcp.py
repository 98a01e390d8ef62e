"""Raw TCP to machines of other nodes, through those nodes."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from proxy.tls import TlsSettings
from proxy.tls_metrics import TlsMetrics
from tests.fakes.client import RawClient
from tests.proxy.edge import wait_for
from tests.proxy.peer_edge import NOWHERE, PeerNode, World
from tests.proxy.tcp_edge import read_until_reset

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.fakes.machine import Connection

RAW = '{"handlers": []%s}'
RESET = struct.pack("ii", 1, 0)


class RawWorld(World):
    """Clients of `near` reach machines of `far`."""

    def __init__(self) -> None:
        super().__init__()
        self.port = 0

    async def open(self, *options: str) -> tuple[PeerNode, PeerNode]:
        far = await self.node("far", "syd")
        near = await self.node("near", "ams", machine_networks=NOWHERE)
        self.put_app(options=RAW % "".join(f", {option}" for option in options))
        sock = socket.create_server(("127.0.0.1", 0))
        near.server.start_tcp(sock, "app", TlsSettings(), None, TlsMetrics())
        self.port = sock.getsockname()[1]
        return near, far

    async def client(self) -> RawClient:
        client = await RawClient.connect(self.port)
        self.nodes["near"].clients.append(client)
        return client


@pytest_asyncio.fixture
async def world() -> AsyncIterator[RawWorld]:
    world = RawWorld()
    yield world
    await world.stop()


async def echo(connection: Connection) -> None:
    while data := await connection.read():
        connection.writer.write(data)
        await connection.writer.drain()


async def test_bytes_pass_both_ways_and_the_end_of_the_client_reaches_the_machine(world: RawWorld) -> None:
    near, far = await world.open()
    machine = await world.machine(behave=echo)
    client = await world.client()
    body = bytes(range(256)) * 4_000
    client.send(body)
    assert await client.read(len(body)) == body
    assert (near.peers["far"][:2], far.relayed) == ((1, 1), 1)
    assert far.table.machine("m1").remote_load == 1
    client.writer.write_eof()
    assert await client.read_to_end() == b""
    await wait_for(lambda: machine.connections[0].closed)
    await wait_for(lambda: not near.server._relays and not far.server.peer_metrics.relaying)
    assert (near.table.machine("m1").in_flight, far.table.machine("m1").remote_load) == (0, 0)


async def test_end_of_the_machine_comes_behind_its_last_byte(world: RawWorld) -> None:
    await world.open()

    async def behave(connection: Connection) -> None:
        connection.writer.write(bytes(1_000_000))

    await world.machine(behave=behave)
    client = await world.client()
    assert await client.read_to_end() == bytes(1_000_000)


async def test_connection_that_is_cut_on_one_side_is_cut_on_the_other(world: RawWorld) -> None:
    near, _ = await world.open()
    resets = []

    async def behave(connection: Connection) -> None:
        data = await connection.read()
        if data == b"cut":
            sock = connection.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            connection.writer.transport.abort()
        else:
            connection.writer.write(b"x")
            with pytest.raises(ConnectionResetError):
                await connection.read()
            resets.append(data)

    await world.machine(behave=behave)
    client = await world.client()
    client.send(b"cut")
    assert await read_until_reset(client) == b""
    client = await world.client()
    client.send(b"stay")
    assert await client.read(1) == b"x"
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()
    await wait_for(lambda: resets == [b"stay"])
    with suppress(ConnectionResetError):
        await client.writer.wait_closed()
    await wait_for(lambda: not near.server._relays)


async def test_machine_that_refuses_is_passed_over(world: RawWorld) -> None:
    near, far = await world.open()
    await world.machine(behave=echo)
    world.put_machine("m0", "far", "127.0.0.1:1")
    for _ in range(6):
        client = await world.client()
        client.send(b"a")
        assert await client.read(1) == b"a"
    assert near.table.machine("m0").failures
    assert far.server.peer_metrics.refusals.keys() == {"PC01"}


async def test_client_is_announced_and_slow_machines_stop_it(world: RawWorld) -> None:
    near, _ = await world.open('"proxy_protocol": "v1"')
    go = asyncio.Event()
    got = 0

    async def behave(connection: Connection) -> None:
        nonlocal got
        assert (await connection.read_until(b"\r\n")).startswith(b"PROXY TCP4 127.0.0.1 ")
        await go.wait()
        while data := await connection.reader.read(1_000_000):
            got += len(data)

    await world.machine(behave=behave)
    client = await world.client()
    client.send(bytes(50_000_000))
    await wait_for(lambda: next(iter(near.server._relays))._paused)
    go.set()
    await client.writer.drain()
    client.writer.write_eof()
    await wait_for(lambda: got == 50_000_000)


async def test_auto_goes_through_the_node_when_connecting_fails(world: RawWorld) -> None:
    near, far = await world.open('"reach": "auto"')
    await world.machine(behave=echo)
    for relayed in (1, 2):
        client = await world.client()
        client.send(b"a")
        assert await client.read(1) == b"a"
        assert far.relayed == relayed
    assert near.server._pool.peers._machines.knows("far 127.0.0.1")


async def test_dead_node_cuts_the_connection(world: RawWorld) -> None:
    near, far = await world.open()
    await world.machine(behave=echo)
    client = await world.client()
    client.send(b"a")
    assert await client.read(1) == b"a"
    for session in list(far.server._peer_sessions):
        session.abort()
    assert await read_until_reset(client) == b""
    await wait_for(lambda: not near.server._relays)
