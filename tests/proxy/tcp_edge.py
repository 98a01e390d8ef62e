"""A proxy on loopback with ports for raw TCP, and machines that echo, count and close as they are told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import TYPE_CHECKING

from tests.fakes.client import RawClient
from tests.proxy.tls_edge import TlsEdge

if TYPE_CHECKING:
    from tests.fakes.machine import Behaviour, Connection, FakeMachine


async def echo(connection: Connection) -> None:
    """Send back what comes, and the end behind it."""
    while data := await connection.read():
        connection.writer.write(data)
        await connection.writer.drain()
    connection.writer.write_eof()


class TcpEdge(TlsEdge):
    """`listen` gives a port of an app; `started` before that."""

    def put_raw(
        self, name: str, host: str = "", handlers: tuple[str, ...] = (), port: int = 0, **options: object
    ) -> None:
        limits = {key: options.pop(key) for key in ("soft", "hard") if key in options}
        self.put_app(
            name, host or f"{name}.test", options=json.dumps({"handlers": handlers, **options}), **limits
        )

    async def echo_machine(
        self, machine_id: str = "m1", app: str = "app", behave: Behaviour = echo
    ) -> FakeMachine:
        return await self.machine(machine_id, app, behave=behave)

    def listen(self, app: str = "app", *, certificates: bool = True) -> int:
        """Open a port for raw TCP."""
        sock = socket.create_server(("127.0.0.1", 0))
        known = self.certificates if certificates else None
        self.server.start_tcp(sock, app, self.tls, known, self.tls_metrics)
        return sock.getsockname()[1]

    async def tcp_client(self, port: int) -> RawClient:
        client = await RawClient.connect(port)
        self.clients.append(client)
        return client

    @property
    def relays(self) -> int:
        return len(self.server._relays)


async def read_until_reset(client: RawClient) -> bytes:
    """Everything until the connection is reset; a clean end is an error."""
    data = b""
    async with asyncio.timeout(10):
        try:
            while piece := await client.reader.read(65_536):
                data += piece
        except ConnectionResetError:
            with contextlib.suppress(ConnectionResetError):  # which asyncio would tell once more
                await client.writer.wait_closed()
            return data
    raise AssertionError("the connection ended as if that was all")
