"""A client that sends raw bytes and reads answers without mercy for mistakes in them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

DEADLINE_S = 20.0


@dataclass
class Response:
    status: int
    fields: list[tuple[bytes, bytes]]  # names in lower case
    body: bytes
    head: bytes

    def values(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.fields if key == name.lower()]

    @property
    def error(self) -> str:
        return (self.values(b"fly-proxy-error") or [b""])[0].decode()

    @property
    def json(self) -> dict[str, str]:
        return json.loads(self.body)


class RawClient:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> RawClient:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def get(self, path: bytes = b"/", *lines: bytes) -> Response:
        self.send(b"\r\n".join((b"GET %b HTTP/1.1" % path, b"Host: app.test", *lines, b"", b"")))
        return await self.read_response()

    async def read_response(self, *, to_head: bool = False) -> Response:
        async with asyncio.timeout(DEADLINE_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            lines = head[:-4].split(b"\r\n")
            fields = [(n.lower(), v) for n, _, v in (line.partition(b": ") for line in lines[1:])]
            response = Response(int(lines[0].split(b" ")[1]), fields, b"", head)
            if to_head or response.status in {204, 304} or response.status < 200:
                return response
            if response.values(b"transfer-encoding"):
                assert not response.values(b"content-length")
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    response.body += (await self.reader.readexactly(size + 2))[:-2]
                assert await self.reader.readexactly(2) == b"\r\n"
            elif lengths := response.values(b"content-length"):
                assert len(lengths) == 1
                response.body = await self.reader.readexactly(int(lengths[0]))
            else:
                response.body = await self.reader.read()
            return response

    async def read(self, size: int) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.readexactly(size)

    async def read_to_end(self) -> bytes:
        """Everything until the proxy closes; a reset counts as that."""
        data = b""
        async with asyncio.timeout(DEADLINE_S):
            try:
                while piece := await self.reader.read(65_536):
                    data += piece
            except ConnectionError:
                pass
        return data

    async def read_body_of(self, size: int) -> bytes:
        """Skip a head, then return so many bytes of body."""
        async with asyncio.timeout(DEADLINE_S):
            data = b""
            while b"\r\n\r\n" not in data:
                data += await self.reader.read(1)
            return await self.reader.readexactly(size)

    def close(self) -> None:
        self.writer.transport.abort()
