"""Raw TCP: bytes, ends and cuts pass between a client and a machine as they came."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from proxy.access_log import AccessLog
from proxy.core.access_line import Entry, render_combined
from proxy.core.proxy_protocol import render_announcement
from tests.proxy.edge import wait_for
from tests.proxy.tcp_edge import TcpEdge, echo, read_until_reset

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.fakes.machine import Connection

LARGE = bytes(range(256)) * 32_768  # 8 MiB: more than all buffers on the way


@pytest_asyncio.fixture
async def edge(tmp_path: Path) -> AsyncIterator[TcpEdge]:
    edge = TcpEdge(tmp_path)
    edge.put_raw("app")
    yield edge
    await edge.stop()


async def test_bytes_pass_both_ways_and_the_end_of_each_behind_them(edge: TcpEdge) -> None:
    machine = await edge.echo_machine()
    await edge.start()
    client = await edge.tcp_client(edge.listen())
    client.send(LARGE)
    client.writer.write_eof()
    assert await client.read_to_end() == LARGE
    assert machine.received == LARGE
    await wait_for(lambda: not edge.relays and not edge.metrics.upstreams_open)
    assert not edge.metrics.connections_open


async def test_machine_may_speak_first_and_go_on_after_the_clients_end(edge: TcpEdge) -> None:
    async def behave(connection: Connection) -> None:
        connection.writer.write(b"220 ready\r\n")
        assert await connection.read() == b"QUIT"
        assert await connection.read() == b""
        connection.writer.write(b"221 bye\r\n")

    await edge.echo_machine(behave=behave)
    await edge.start()
    client = await edge.tcp_client(edge.listen())
    assert await client.read(11) == b"220 ready\r\n"
    client.send(b"QUIT")
    client.writer.write_eof()
    assert await client.read_to_end() == b"221 bye\r\n"


async def test_client_that_ends_at_once_is_answered_all_the_same(edge: TcpEdge) -> None:
    async def behave(connection: Connection) -> None:
        assert await connection.read() == b""
        connection.writer.write(b"Mon Nov 23")

    await edge.echo_machine(behave=behave)
    await edge.start()
    client = await edge.tcp_client(edge.listen())
    client.writer.write_eof()
    assert await client.read_to_end() == b"Mon Nov 23"


async def test_client_may_go_on_after_the_machines_end(edge: TcpEdge) -> None:
    async def behave(connection: Connection) -> None:
        connection.writer.write(b"that is all")
        connection.writer.write_eof()
        while await connection.read():
            pass

    machine = await edge.echo_machine(behave=behave)
    await edge.start()
    client = await edge.tcp_client(edge.listen())
    assert await client.read_to_end() == b"that is all"
    client.send(b"a late word")
    client.writer.write_eof()
    await wait_for(lambda: machine.received == b"a late word")
    await wait_for(lambda: not edge.relays)


async def test_what_came_before_there_was_a_machine_is_passed_on_with_its_end(edge: TcpEdge) -> None:
    edge.put_raw("app", hard=1, soft=1)
    machine = await edge.echo_machine()
    await edge.start()
    port = edge.listen()
    first = await edge.tcp_client(port)
    first.send(b"x")
    await first.read(1)
    second = await edge.tcp_client(port)
    second.send(b"early" * 100_000)
    second.writer.write_eof()
    await wait_for(lambda: edge.metrics.queued == 1)
    assert len(machine.connections) == 1
    first.close()
    assert await second.read_to_end() == b"early" * 100_000
    assert edge.metrics.queue_waits == 1


@pytest.mark.parametrize("who", ["client", "machine"])
async def test_reset_is_passed_on_as_one(edge: TcpEdge, who: str) -> None:
    ended: list[object] = []
    go = asyncio.Event()

    async def behave(connection: Connection) -> None:
        connection.writer.write(b"half of it")
        if who == "machine":
            await go.wait()
            cut(connection.writer)
        try:
            ended.append(await connection.reader.read(1))
        except ConnectionResetError as error:
            ended.append(type(error))

    await edge.echo_machine(behave=behave)
    await edge.start()
    client = await edge.tcp_client(edge.listen())
    assert await client.read(10) == b"half of it"
    if who == "machine":
        go.set()
        await read_until_reset(client)
    else:
        cut(client.writer)
        await wait_for(lambda: ended == [ConnectionResetError])
    await wait_for(lambda: not edge.relays)


def cut(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.transport.abort()


@pytest.mark.parametrize("slow", ["client", "machine"])
async def test_who_does_not_read_stops_the_other_side_and_costs_little(edge: TcpEdge, slow: str) -> None:
    go = asyncio.Event()
    sent = [0]

    async def pump(writer: asyncio.StreamWriter) -> None:
        while not go.is_set():
            writer.write(b"x" * 65_536)
            sent[0] += 65_536
            await writer.drain()
        writer.write_eof()

    async def behave(connection: Connection) -> None:
        if slow == "client":
            await pump(connection.writer)
        else:
            connection.writer.transport.pause_reading()
            await go.wait()
            connection.writer.transport.resume_reading()
            while await connection.read():
                pass

    machine = await edge.echo_machine(behave=behave)
    await edge.start()
    client = await edge.tcp_client(edge.listen())
    pumping = None
    if slow == "client":
        client.writer.transport.pause_reading()
    else:
        pumping = asyncio.create_task(pump(client.writer))
    before = -1
    while sent[0] != before or not sent[0]:
        before = sent[0]
        await asyncio.sleep(0.1)
    (relay,) = edge.server._relays
    waiting = relay.transport if slow == "client" else relay.peer.transport
    assert 0 < waiting.get_write_buffer_size() < 1_000_000
    go.set()
    if slow == "client":
        client.writer.transport.resume_reading()
        assert len(await client.read_to_end()) == sent[0]
    else:
        await pumping
        await wait_for(lambda: len(machine.received) == sent[0])
    client.writer.write_eof()
    await wait_for(lambda: not edge.relays)


async def test_idle_connection_is_cut_and_one_with_traffic_is_not(edge: TcpEdge) -> None:
    edge.put_raw("app", idle_timeout_ms=150)
    machine = await edge.echo_machine()
    await edge.start()
    port = edge.listen()
    client = await edge.tcp_client(port)
    for _ in range(10):
        client.send(b"x")
        await client.read(1)
        await asyncio.sleep(0.04)
    await read_until_reset(client)
    await wait_for(lambda: machine.connections[0].closed)


async def test_machines_that_refuse_are_passed_over(edge: TcpEdge) -> None:
    for i in range(3):
        with socket.create_server(("127.0.0.1", 0)) as closed:
            edge.put_machine(f"dead{i}", closed.getsockname()[1])
    await edge.echo_machine()
    await edge.start()
    port = edge.listen()
    for _ in range(5):
        client = await edge.tcp_client(port)
        client.send(b"hello")
        client.writer.write_eof()
        assert await client.read_to_end() == b"hello"
    assert edge.metrics.connect_failures["PC01"] == edge.metrics.app("app").retries > 0


async def test_without_a_machine_the_connection_is_cut(edge: TcpEdge) -> None:
    await edge.start()
    client = await edge.tcp_client(edge.listen())
    assert await read_until_reset(client) == b""
    assert edge.metrics.app("app").errors == {"PR01": 1}
    unknown = await edge.tcp_client(edge.listen("nobody"))
    assert await unknown.read_to_end() == b""
    assert edge.metrics.errors == {"PH13": 1}


async def test_connections_are_what_the_limits_count(edge: TcpEdge) -> None:
    edge.put_raw("app", soft=1, hard=2)
    machines = [await edge.echo_machine(f"m{i}") for i in range(2)]
    await edge.start(queue_timeout_s=0.05)
    port = edge.listen()
    for _ in range(4):
        client = await edge.tcp_client(port)
        client.send(b"x")
        await client.read(1)
    assert [len(machine.connections) for machine in machines] == [2, 2]
    assert await read_until_reset(await edge.tcp_client(port)) == b""
    assert edge.metrics.app("app").errors == {"PR04": 1}


@pytest.mark.parametrize("reset", [True, False])
async def test_client_that_leaves_the_queue_makes_room_in_it(edge: TcpEdge, *, reset: bool) -> None:
    edge.put_raw("app", soft=1, hard=1)
    machine = await edge.echo_machine()
    await edge.start()
    port = edge.listen()
    first, second = await edge.tcp_client(port), await edge.tcp_client(port)
    first.send(b"x")
    await first.read(1)
    await wait_for(lambda: edge.metrics.queued == 1)
    (cut if reset else asyncio.StreamWriter.close)(second.writer)
    await wait_for(lambda: edge.metrics.queued == 0, deadline_s=3)
    first.close()
    await wait_for(lambda: not edge.relays)
    assert len(machine.connections) == 1
    assert all(target.in_flight == 0 for target in edge.table.targets())


async def test_nearest_tier_is_preferred(edge: TcpEdge) -> None:
    far = await edge.machine("far", region="syd", behave=echo)
    near = await edge.machine("near", region="ams", behave=echo)
    await edge.start()
    port = edge.listen()
    for _ in range(5):
        client = await edge.tcp_client(port)
        client.send(b"x")
        await client.read(1)
    assert (len(near.connections), len(far.connections)) == (5, 0)


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_machine_is_told_the_client_when_it_asks_for_it(edge: TcpEdge, version: str) -> None:
    edge.put_raw("app", proxy_protocol=version)
    machine = await edge.echo_machine()
    await edge.start()
    port = edge.listen()
    client = await edge.tcp_client(port)
    client.send(b"x")
    own = client.writer.get_extra_info("sockname")
    header = render_announcement(version, own, ("127.0.0.1", port))
    assert await client.read(len(header) + 1) == header + b"x"
    assert machine.received == header + b"x"


V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 5432\r\n"


async def test_announced_client_is_told_to_the_machine(edge: TcpEdge) -> None:
    edge.put_raw("app", proxy_protocol="v1")
    await edge.echo_machine()
    await edge.start(proxy_protocol_from=("127.0.0.0/8",))
    client = await edge.tcp_client(edge.listen())
    client.send(V1 + b"hello")
    assert await client.read(len(V1) + 5) == V1 + b"hello"


@pytest.mark.parametrize("first", [b"hello there", V1[:-3] + b"x\r\n"])
async def test_announcer_that_announces_nothing_is_cut(edge: TcpEdge, first: bytes) -> None:
    machine = await edge.echo_machine()
    await edge.start(proxy_protocol_from=("127.0.0.0/8",))
    client = await edge.tcp_client(edge.listen())
    client.send(first)
    assert await client.read_to_end() == b""
    assert edge.metrics.bad_announcements == 1
    assert not machine.connections


async def test_limits_of_clients_hold_here_too(edge: TcpEdge) -> None:
    await edge.echo_machine()
    await edge.start(connections_per_client_max=1, connections_per_client_per_s=1)
    port = edge.listen()
    first = await edge.tcp_client(port)
    first.send(b"x")
    await first.read(1)
    for _ in range(3):
        assert await (await edge.tcp_client(port)).read_to_end() == b""
    assert edge.metrics.shed == {"client_connections": 3}
    assert await (await edge.tcp_client(port)).read_to_end() == b""
    assert edge.metrics.shed == {"client_connections": 3, "client_rate": 1}
    first.send(b"y")
    assert await first.read(1) == b"y"
    first.close()
    await wait_for(lambda: not edge.relays)
    assert edge.server._admission.admit("127.0.0.1") is None


async def test_bytes_and_connections_are_counted_by_machine(edge: TcpEdge) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_exactly(3)
        connection.writer.write(b"12345")
        await connection.read()

    await edge.echo_machine(behave=behave)
    await edge.start()
    client = await edge.tcp_client(edge.listen())
    client.send(b"abc")
    await client.read(5)

    def counted() -> dict[str, float]:
        where = (("app", "app"), ("machine", "m1"), ("region", "ams"))
        return {n: v for n, labels, v in edge.metrics.samples() if "_tcp_" in n and labels == where}

    assert counted() == {
        "isthmus_tcp_connections_total": 1,
        "isthmus_tcp_connections_open": 1,
        "isthmus_tcp_received_bytes_total": 3,
        "isthmus_tcp_sent_bytes_total": 5,
    }
    client.close()
    await wait_for(lambda: counted()["isthmus_tcp_connections_open"] == 0)
    assert edge.metrics.in_flight == 0


async def test_drain_lets_connections_end_and_then_cuts_them(edge: TcpEdge) -> None:
    await edge.echo_machine()
    await edge.start()
    port = edge.listen()
    client = await edge.tcp_client(port)
    client.send(b"x")
    await client.read(1)
    draining = asyncio.create_task(edge.server.drain(5))
    await wait_for(lambda: edge.server._plane.draining)
    with pytest.raises(ConnectionRefusedError):
        await edge.tcp_client(port)
    client.send(b"y")
    assert await client.read(1) == b"y"
    client.writer.write_eof()
    assert await draining
    assert await client.read_to_end() == b""


async def test_stop_cuts_what_is_left(edge: TcpEdge) -> None:
    await edge.echo_machine()
    await edge.start()
    client = await edge.tcp_client(edge.listen())
    client.send(b"x")
    await client.read(1)
    assert not await edge.server.drain(0.01)
    await edge.server.close()
    edge.started = False
    await read_until_reset(client)
    assert not edge.relays


async def test_http_is_not_served_for_a_raw_service(edge: TcpEdge) -> None:
    machine = await edge.echo_machine()
    await edge.start()
    response = await edge.get()
    assert (response.status, response.error) == (404, "PH13")
    assert not machine.connections


async def test_app_with_http_is_passed_on_raw_on_a_port_of_its_own(edge: TcpEdge) -> None:
    edge.put_app("app", "app.test")
    await edge.machine()
    await edge.start()
    client = await edge.tcp_client(edge.listen())
    assert (await client.get()).values(b"via") == []
    assert (await edge.get()).values(b"via") == [b"1.1 isthmus"]


async def test_machine_under_maintenance_gets_nothing(edge: TcpEdge) -> None:
    edge.put_raw("app", maintenance="later")
    machine = await edge.echo_machine()
    await edge.start()
    assert await read_until_reset(await edge.tcp_client(edge.listen())) == b""
    assert edge.metrics.app("app").errors == {"PL03": 1}
    assert not machine.connections


async def test_each_connection_is_a_line_in_the_log_when_it_ends(edge: TcpEdge, tmp_path: Path) -> None:
    file = tmp_path / "access.log"
    edge.access_log = log = AccessLog(str(file), "json", 1, edge.metrics)
    await edge.echo_machine()
    await edge.start()
    port = edge.listen()
    client = await edge.tcp_client(port)
    client.send(b"hello")
    client.writer.write_eof()
    assert await client.read_to_end() == b"hello"
    await wait_for(lambda: not edge.relays)
    edge.table.apply("machines", ("m1",), None)
    await read_until_reset(await edge.tcp_client(port))
    await wait_for(lambda: not edge.relays)
    await asyncio.to_thread(log.close)
    first, second = [json.loads(line) for line in file.read_text().splitlines()]
    told = ("client", "method", "host", "path", "status", "bytes_in", "bytes_out", "app", "machine", "error")
    here = ("127.0.0.1", "TCP", "", f":{port}")
    assert tuple(first[key] for key in told) == (*here, 200, 5, 5, "app", "m1", "")
    assert tuple(second[key] for key in told) == (*here, 503, 0, 0, "app", "", "PR01")


def test_line_in_the_combined_format_names_no_version_of_http() -> None:
    entry = Entry(
        0, b"", b"192.0.2.1", b"TCP", b"", b":5432", -1, [], 200, 1, 2, 0, 0, "a", "m", "r", 0, 0, ""
    )
    assert b'"TCP :5432" 200 2 ' in render_combined(entry)
