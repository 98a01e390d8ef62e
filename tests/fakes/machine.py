"""A machine that records every byte and answers as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass
class Request:
    head: bytes
    body: bytes
    trailers: bytes = b""

    @property
    def line(self) -> bytes:
        return self.head.split(b"\r\n", 1)[0]

    def values(self, name: bytes) -> list[bytes]:
        lines = self.head.split(b"\r\n")[1:]
        return [line.partition(b": ")[2] for line in lines if line.partition(b":")[0].lower() == name.lower()]


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.received = b""
        self.closed = False  # by the proxy

    async def read(self) -> bytes:
        data = await self.reader.read(65_536)
        self.received += data
        self.closed = self.closed or not data
        return data

    async def read_until(self, end: bytes) -> bytes:
        data = await self.reader.readuntil(end)
        self.received += data
        return data

    async def read_exactly(self, size: int) -> bytes:
        data = await self.reader.readexactly(size)
        self.received += data
        return data

    async def read_request(self) -> Request:
        head = await self.read_until(b"\r\n\r\n")
        request = Request(head, b"")
        if request.values(b"transfer-encoding"):
            while size := int(await self.read_until(b"\r\n"), 16):
                request.body += (await self.read_exactly(size + 2))[:-2]
            while (line := await self.read_until(b"\r\n")) != b"\r\n":
                request.trailers += line
        elif lengths := request.values(b"content-length"):
            request.body = await self.read_exactly(int(lengths[0]))
        return request


Behaviour = Callable[[Connection], Awaitable[None]]


@dataclass
class FakeMachine:
    """`answer` maps requests to bytes; `behave` takes a whole connection over instead."""

    answer: Callable[[Request], bytes] = lambda request: OK
    behave: Behaviour | None = None
    requests: list[Request] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)
    port: int = 0
    context: ssl.SSLContext | None = None  # speaks TLS when set

    async def start(self) -> FakeMachine:
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, ssl=self.context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        for connection in self.connections:
            connection.writer.transport.abort()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def received(self) -> bytes:
        return b"".join(connection.received for connection in self.connections)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        connection = Connection(reader, writer)
        self.connections.append(connection)
        try:
            await (self.behave or self._serve)(connection)
        except (asyncio.IncompleteReadError, ConnectionError):
            connection.closed = True
        except asyncio.CancelledError:
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _serve(self, connection: Connection) -> None:
        while True:
            request = await connection.read_request()
            self.requests.append(request)
            connection.writer.write(self.answer(request))
            await connection.writer.drain()
