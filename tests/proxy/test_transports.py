"""What a connection is told besides what asyncio knows, on real sockets."""

from __future__ import annotations

import asyncio
import socket

import pytest

from proxy.transports import reset
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
