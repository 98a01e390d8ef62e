"""What clients can cost, through sockets: each bound holds, is told to the client, and is counted."""

from __future__ import annotations

import asyncio
import socket
import sys
from itertools import count
from typing import TYPE_CHECKING

import pytest

from proxy.admission import TOLD_MAX, Admission, compute_files_max, compute_memory_max, name_client
from proxy.metrics import ProxyMetrics
from proxy.settings import ProxySettings
from tests.fakes.client import RawClient
from tests.fakes.machine import OK, Connection
from tests.proxy.edge import Edge, wait_for

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

GET = b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n"


async def test_connections_beyond_the_limit_are_told_so_until_there_is_room(edge: Edge) -> None:
    await edge.machine()
    await edge.start(connections_max=2, linger_s=0.1)
    first, second, third = [await edge.client() for _ in range(3)]
    response = await third.read_response()
    assert (response.status, response.error) == (503, "PL01")
    assert (response.values(b"retry-after"), response.values(b"connection")) == ([b"1"], [b"close"])
    assert (await second.get()).status == 200
    first.close()
    await wait_for(lambda: edge.metrics.connections_open == 1)
    assert (await edge.get()).status == 200
    assert edge.metrics.shed == {"connections": 1}


@pytest.mark.parametrize(("trusted", "status"), [((), 429), (("127.0.0.0/8",), 200)])
async def test_one_client_has_so_many_connections_and_a_trusted_proxy_any(
    edge: Edge, trusted: tuple[str, ...], status: int
) -> None:
    await edge.machine()
    await edge.start(connections_per_client_max=2, trusted_proxies=trusted)
    first, second = await edge.client(), await edge.client()
    assert (await first.get()).status == (await second.get()).status == 200
    response = await edge.get()
    assert response.status == status
    if status == 429:
        assert (response.error, response.values(b"retry-after")) == ("PL02", [b"1"])
        assert edge.metrics.shed == {"client_connections": 1}


@pytest.mark.parametrize(("trusted", "last"), [((), 429), (("127.0.0.0/8",), 200)])
async def test_one_client_may_connect_so_often_and_a_trusted_proxy_as_it_likes(
    edge: Edge, trusted: tuple[str, ...], last: int
) -> None:
    await edge.machine()
    await edge.start(connections_per_client_per_s=1, trusted_proxies=trusted)
    responses = [await edge.get() for _ in range(5)]
    assert [response.status for response in responses] == [200] * 4 + [last]
    if last == 429:
        assert (responses[4].error, responses[4].values(b"retry-after")) == ("PL02", [b"1"])
        assert responses[4].values(b"connection") == [b"close"]
        assert edge.metrics.shed == {"client_rate": 1}


def post(length: int) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: %d\r\n\r\n" % length


CHUNKED = b"POST / HTTP/1.1\r\nHost: app.test\r\nTransfer-Encoding: chunked\r\n\r\n"


async def test_a_body_that_is_said_to_be_too_large_reaches_no_machine(edge: Edge) -> None:
    machine = await edge.machine()
    await edge.start(body_bytes_max=10)
    assert (await edge.exchange(post(10) + b"x" * 10)).status == 200
    connections = len(machine.connections)
    client = await edge.client()
    client.send(post(11))
    response = await client.read_response()
    assert (response.status, response.error) == (413, "PH14")
    assert await client.read_to_end() == b""
    assert len(machine.connections) == connections


async def test_a_chunked_body_is_cut_when_it_passes_the_limit(edge: Edge) -> None:
    machine = await edge.machine()
    await edge.start(body_bytes_max=10)
    assert (await edge.exchange(CHUNKED + b"5\r\nxxxxx\r\n5\r\nxxxxx\r\n0\r\n\r\n")).status == 200
    client = await edge.client()
    client.send(CHUNKED + b"a\r\nxxxxxxxxxx\r\n")
    await wait_for(lambda: len(machine.requests) + edge.metrics.in_flight == 2)
    client.send(b"1\r\n")
    response = await client.read_response()
    assert (response.status, response.error) == (413, "PH14")
    await wait_for(lambda: machine.connections[-1].closed)
    assert len(machine.requests) == 1
    assert (await edge.exchange(CHUNKED + b"b\r\n")).error == "PH14"


async def test_an_app_has_its_own_limit_of_bodies(edge: Edge) -> None:
    edge.put_app("app", "app.test", options='{"body_bytes_max": 20}')
    await edge.machine()
    await edge.start(body_bytes_max=10)
    assert (await edge.exchange(post(20) + b"x" * 20)).status == 200
    assert (await edge.exchange(post(21))).error == "PH14"


async def test_a_flood_of_connections_is_cut_without_a_word(edge: Edge) -> None:
    await edge.machine()
    await edge.start(connections_max=1, linger_s=60.0)
    kept = await edge.client()
    assert (await kept.get()).status == 200
    flood = [await edge.client() for _ in range(TOLD_MAX + 20)]
    await wait_for(lambda: edge.metrics.shed == {"connections": len(flood)})
    await wait_for(lambda: edge.metrics.connections_open <= TOLD_MAX + 1)
    assert (await kept.get()).status == 200


async def test_a_connection_carries_so_many_requests(edge: Edge) -> None:
    await edge.machine()
    await edge.start(requests_per_connection_max=2)
    client = await edge.client()
    assert (await client.get()).values(b"connection") == []
    assert (await client.get()).values(b"connection") == [b"close"]
    assert await client.read_to_end() == b""


async def test_with_memory_short_requests_are_refused_while_others_can_free_some(edge: Edge) -> None:
    free = asyncio.Event()

    async def behave(connection: Connection) -> None:
        await connection.read_request()
        await free.wait()
        connection.writer.write(OK)

    await edge.machine(behave=behave)
    await edge.start(memory_bytes_max=1)
    client = await edge.client()
    client.send(GET)
    await wait_for(lambda: edge.metrics.in_flight == 1)
    waiting, refused = None, None
    for _ in range(100):  # the pass that finds out comes within a quarter of a second
        waiting = await edge.client()
        waiting.send(GET)
        try:
            async with asyncio.timeout(0.05):
                refused = await waiting.read_response()
            break
        except TimeoutError:
            continue
    assert refused is not None
    assert (refused.status, refused.error, refused.values(b"retry-after")) == (503, "PL01", [b"1"])
    assert edge.metrics.shed == {"memory": 1}
    free.set()
    assert (await client.read_response()).status == 200
    await wait_for(lambda: edge.metrics.in_flight == 0)
    async with asyncio.timeout(5):
        while (await edge.get()).status != 200:
            pass


def test_bodies_for_replays_and_idle_connections_go_first() -> None:
    metrics = ProxyMetrics()
    admission = Admission(ProxySettings("n1", "ams", memory_bytes_max=1), metrics, files_max=8)

    class Plane:
        body_kept_max, shedding = 1_048_576, False

    closed: list[int] = []
    admission.watch(Plane, lambda: closed.append(1))
    metrics.upstreams_open = 7
    admission.handle_deadline()
    assert (Plane.body_kept_max, Plane.shedding, closed) == (0, False, [])
    metrics.upstreams_open = 8
    metrics.in_flight = 1
    admission.handle_deadline()
    assert (Plane.shedding, closed) == (True, [1])


def test_clients_of_one_ipv6_network_are_one() -> None:
    assert (
        name_client("2001:db8:1:2:3::4") == name_client("2001:db8:1:2::9") != name_client("2001:db8:1:3::9")
    )
    assert name_client("::ffff:10.0.0.1") == name_client("10.0.0.1")


def test_what_nobody_set_is_read_from_the_system() -> None:
    assert compute_files_max() > 0
    assert 0 < compute_memory_max(2) <= compute_memory_max(1)


async def trickle(client: RawClient, piece: bytes, pause_s: float) -> None:
    for _ in count():
        client.send(piece)
        await asyncio.sleep(pause_s)


async def test_a_body_that_trickles_is_cut_though_it_never_stops(edge: Edge) -> None:
    machine = await edge.machine()
    await edge.start(body_timeout_s=0.1, body_bytes_per_s_min=10_000)
    client = await edge.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 1000000\r\n\r\n")
    sending = asyncio.ensure_future(trickle(client, b"x", 0.005))
    assert (await client.read_response()).error == "PH09"
    sending.cancel()
    await wait_for(lambda: machine.connections[0].closed)


async def test_a_body_that_keeps_its_rate_may_take_longer_than_any_silence(edge: Edge) -> None:
    machine = await edge.machine()
    await edge.start(body_timeout_s=0.1, body_bytes_per_s_min=100)
    client = await edge.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 4000\r\n\r\n")
    for _ in range(40):
        client.send(b"x" * 100)
        await asyncio.sleep(0.01)
    assert (await client.read_response()).status == 200
    assert len(machine.requests[0].body) == 4000


def streaming(size: int) -> Callable[[Connection], Awaitable[None]]:
    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // 65_536):
            connection.writer.write(b"x" * 65_536)
            await connection.writer.drain()

    return behave


@pytest.fixture
def slow() -> Iterator[socket.socket]:
    """A client whose kernel takes little, and that reads only when it is told to."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        client.setblocking(False)
        yield client


async def send_slow(edge: Edge, slow: socket.socket, data: bytes) -> None:
    loop = asyncio.get_running_loop()
    await loop.sock_connect(slow, ("127.0.0.1", edge.server.port))
    await loop.sock_sendall(slow, data)


async def test_a_slow_reader_costs_little_and_is_cut(edge: Edge, slow: socket.socket) -> None:
    machine = await edge.machine(behave=streaming(1 << 30))
    await edge.start(send_timeout_s=0.4)
    await send_slow(edge, slow, GET)
    most, taken = 0, 0
    async with asyncio.timeout(10):
        while edge.metrics.connections_open or not edge.metrics.connections:
            for connection in edge.server._clients:
                if connection._transport is not None:
                    most = max(most, connection._transport.get_write_buffer_size())
            for upstream in edge.server._pool.connections:
                if upstream._splice is not None:
                    most = max(most, upstream._splice._held)
            try:
                taken += len(slow.recv(100))
            except BlockingIOError:
                pass
            except ConnectionError:
                break
            await asyncio.sleep(0.005)
    assert 0 < most < 1_000_000
    assert taken > 0
    await wait_for(lambda: machine.connections[0].closed)


async def test_the_end_of_an_answer_waits_for_a_slow_client(edge: Edge) -> None:
    size = 30_000_000  # more than both kernels take
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % size
    await edge.machine(answer=lambda r: head + b"x" * size + b"\r\n0\r\n\r\n")
    await edge.start(linger_s=0.05, write_buffer_bytes_max=2 * size)
    client = await edge.client()
    client.writer.transport.pause_reading()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\nConnection: close\r\n\r\n")
    await wait_for(lambda: bool(edge.metrics.apps) and not edge.metrics.in_flight)
    await asyncio.sleep(0.2)  # far longer than a connection lingers that nothing waits for
    client.writer.transport.resume_reading()
    assert len(await client.read_to_end()) > size


async def test_an_answer_that_is_never_taken_frees_its_connection(edge: Edge, slow: socket.socket) -> None:
    # Less than makes the client a slow one: it waits in the connection while that is idle.
    await edge.machine(answer=lambda r: b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n" + b"x" * 60_000)
    await edge.start(keepalive_timeout_s=0.05, send_timeout_s=0.1, write_buffer_bytes_max=10_000_000)
    await send_slow(edge, slow, GET * 80)
    await wait_for(lambda: edge.metrics.connections == 1 and edge.metrics.connections_open == 0)


async def test_with_files_short_what_is_open_goes_on_and_the_rest_is_shed(edge: Edge) -> None:
    machine = await edge.machine()
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.fakes.small_proxy", "240", str(machine.port)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        port = int(await child.stdout.readline())
        steady = [await RawClient.connect(port) for _ in range(40)]
        edge.clients += steady
        storm = await asyncio.gather(*(RawClient.connect(port) for _ in range(400)))
        edge.clients += storm
        # All at once, each with a machine connection of its own.
        for client in steady:
            client.send(GET)
        for client in steady:
            assert (await client.read_response()).status == 200
        ends = await asyncio.gather(*(end_of(client) for client in storm))
        assert ends.count("told") > 0
        assert ends.count("told") + ends.count("cut") > 300
        for client in storm:
            client.close()
        response = None
        async with asyncio.timeout(10):
            while response is None or response.status != 200:
                client = await RawClient.connect(port)
                edge.clients.append(client)
                client.send(GET)
                response = await client.read_response()
    finally:
        child.stdin.close()
        await child.wait()
    assert child.returncode == 0


async def end_of(client: RawClient) -> str:
    """How a connection of the storm fared: admitted ones are the ones that nothing comes on."""
    try:
        async with asyncio.timeout(1):
            data = await client.reader.read(12)
    except TimeoutError:
        return "admitted"
    except ConnectionError:
        return "cut"
    return "told" if data == b"HTTP/1.1 503" else "cut"
