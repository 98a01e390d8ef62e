"""No file descriptor left, and floods of handshakes: what is open goes on, and all recovers by itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from proxy.tls import TlsSettings
from tests.proxy.edge import wait_for
from tests.proxy.tcp_edge import TcpEdge
from tests.proxy.test_tls import client_hello

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest_asyncio.fixture
async def edge(tmp_path: Path) -> AsyncIterator[TcpEdge]:
    edge = TcpEdge(tmp_path)
    edge.write("app.test")
    yield edge
    await edge.stop()


@contextlib.contextmanager
def no_files() -> Iterator[None]:
    """Take every descriptor that is left, below a limit that is soon reached."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 64, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(taken[0]))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def connect(sock: socket.socket, port: int) -> None:
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))


@pytest.mark.parametrize("listener", ["plain", "tls", "tcp"])
async def test_without_files_nobody_is_accepted_what_is_open_goes_on_and_then_all_is_well(
    edge: TcpEdge, listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.accepting._PAUSE_S", 0.05)
    await edge.machine()
    await edge.start()
    port = {"plain": edge.server.port, "tls": edge.tls_port, "tcp": edge.listen()}[listener]
    open_before = await edge.client()
    assert (await open_before.get()).status == 200  # with a connection to the machine that is kept
    with contextlib.ExitStack() as closing:
        late = [closing.enter_context(socket.socket()) for _ in range(10)]
        with no_files():
            for sock in late:
                await connect(sock, port)
            for _ in range(20):
                assert (await open_before.get()).status == 200
            assert edge.metrics.connections == 1
            assert edge.tls_metrics.pending == 0
        client = await (edge.tls_client() if listener == "tls" else edge.tcp_client(port))
        assert (await client.get()).status == 200


async def test_request_that_needs_a_file_is_told_so_and_its_machine_is_not_blamed(edge: TcpEdge) -> None:
    await edge.machine()
    await edge.start()
    client = await edge.client()
    await wait_for(lambda: edge.metrics.connections_open == 1)
    with no_files():
        response = await client.get()
    assert (response.status, response.error, response.values(b"retry-after")) == (503, "PL01", [b"1"])
    assert edge.metrics.shed == {"files": 1}
    assert edge.table.machine("m1").failures == 0
    assert (await edge.get()).status == 200


async def test_flood_of_half_handshakes_does_not_keep_others_out(edge: TcpEdge) -> None:
    await edge.machine()
    edge.tls = TlsSettings(handshakes_max=64)
    await edge.start(handshakes_per_client_per_s=5)
    hello = client_hello("app.test")
    stop = asyncio.Event()
    begun = [0]

    async def flood(address: str) -> None:
        held: list[asyncio.StreamWriter] = []
        while not stop.is_set():
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", edge.tls_port, local_addr=(address, 0))
                writer.write(hello[: -1 if begun[0] % 2 else None])
                held.append(writer)
                begun[0] += 1
            await asyncio.sleep(0)
        for writer in held:
            writer.transport.abort()

    floods = [asyncio.create_task(flood(f"127.0.0.{i}")) for i in range(2, 10)]
    await wait_for(lambda: begun[0] > 500)
    try:
        for _ in range(5):
            client = await edge.tls_client()
            assert (await client.get()).status == 200
            assert edge.tls_metrics.pending <= 64
    finally:
        stop.set()
        await asyncio.gather(*floods)
    assert edge.tls_metrics.failures["client_rate"] > 0
    assert edge.metrics.shed["client_rate"] == edge.tls_metrics.failures["client_rate"]
    await wait_for(lambda: edge.tls_metrics.pending == 0)
