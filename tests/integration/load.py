"""Clients that ask without a pause, for tests in which no request may fail."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING, Self

from tests.fakes.client import RawClient

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

GET = b"GET /small HTTP/1.1\r\nHost: app.test\r\n\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: app.test\r\nContent-Length: 20000\r\n\r\n" + b"x" * 20_000


class Load:
    """Runs clients until `stop`; `failures` has what went wrong, of requests that were begun."""

    def __init__(self, port: int, seed: int = 1) -> None:
        self.port = port
        self.answered = 0
        self.closes_told = 0  # answers that said that they were the last of their connection
        self.failures: list[str] = []
        self._random = random.Random(seed)
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self.is_closing = False  # set when new connections may be refused from now on

    def start(self, kept: int = 8, fresh: int = 4, posting: int = 2) -> None:
        """Begin with so many clients of each kind."""
        for kind, count in ((self._keep, kept), (self._come_and_go, fresh), (self._post, posting)):
            self._tasks += [asyncio.create_task(self._guard(kind)) for _ in range(count)]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Let each finish its request."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _guard(self, kind: Callable[[], Awaitable[None]]) -> None:
        while not self._stopping:
            try:
                await kind()
            except ConnectionRefusedError as error:
                if not self.is_closing:
                    self.failures.append(f"{kind.__name__}: {error!r}")
                await asyncio.sleep(0.05)
            except (OSError, asyncio.IncompleteReadError, ValueError, TimeoutError) as error:
                self.failures.append(f"{kind.__name__}: {error!r}")
                await asyncio.sleep(0.1)

    async def _ask(self, client: RawClient, request: bytes) -> bool:
        client.send(request)
        response = await client.read_response()
        if response.status != 200:
            self.failures.append(f"{response.status} {response.body!r:.200}")
        self.answered += 1
        is_last = response.values(b"connection") == [b"close"]
        self.closes_told += is_last
        return is_last

    async def _keep(self) -> None:
        """Use one connection for as long as it is kept, at any pace."""
        client = await RawClient.connect(self.port)
        with contextlib.closing(client):
            while not (await self._ask(client, GET) or self._stopping):
                await self._rest(self._random.choice((0.0, 0.01, 0.03, 0.3)))

    async def _come_and_go(self) -> None:
        client = await RawClient.connect(self.port)
        with contextlib.closing(client):
            await self._ask(client, GET)
        await self._rest(0.005)

    async def _rest(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _post(self) -> None:
        client = await RawClient.connect(self.port)
        with contextlib.closing(client):
            while not (await self._ask(client, POST) or self._stopping):
                await self._rest(0.03)
