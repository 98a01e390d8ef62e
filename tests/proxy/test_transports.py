"""What a connection is told besides what asyncio knows, on real sockets."""

from __future__ import annotations

import asyncio
import socket
from typing import cast

import pytest

from proxy.transports import read_left, reset
from tests.proxy.edge import wait_for


async def test_the_peer_of_a_connection_that_is_cut_sees_no_end_in_good_order() -> None:
    transport, other = await connect()
    with other:
        reset(transport)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(asyncio.get_running_loop().sock_recv(other, 1), 10)


async def test_one_that_is_closed_can_be_cut_again() -> None:
    # A protocol over TLS learns of this a turn of the loop after it.
    transport, other = await connect()
    with other:
        transport.abort()
        closed = transport.get_extra_info("socket")
        await wait_for(lambda: closed.fileno() < 0)
        reset(transport)


async def connect() -> tuple[asyncio.Transport, socket.socket]:
    """Return both ends of a new connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    other.setblocking(False)
    transport, _ = await asyncio.get_running_loop().connect_accepted_socket(asyncio.Protocol, accepted)
    return transport, other


async def test_what_came_before_a_connection_broke_can_still_be_read() -> None:
    lost: asyncio.Future[tuple[Exception | None, bytes]] = asyncio.get_running_loop().create_future()

    class Late(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast("asyncio.Transport", transport)
            self.transport.pause_reading()

        def connection_lost(self, exc: Exception | None) -> None:
            lost.set_result((exc, read_left(self.transport)))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        transport, _ = await asyncio.get_running_loop().create_connection(Late, *listener.getsockname())
        peer, _ = listener.accept()
        transport.write(b"a request")
        assert peer.recv(1)
        peer.sendall(b"an early answer")
        peer.close()  # with bytes unread: a reset
        async with asyncio.timeout(5):
            while not lost.done():
                transport.write(b"more")
                await asyncio.sleep(0)
    broken, left = lost.result()
    assert broken is not None
    assert left == b"an early answer"
