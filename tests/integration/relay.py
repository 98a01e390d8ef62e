"""A relay in front of a node's gossip port, which can drop what certain senders send.

Each node has a loopback address of its own (127.0.1.x) and advertises its relay, so that all gossip between
nodes passes here, datagrams and streams, and the sender is known by its source address. A cut behaves as a
dead network: nothing is refused, nothing arrives. `dropped` counts what a cut has swallowed.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import Any


class Relay:
    """Forwards UDP and TCP from one port to a node's gossip address; runs in a thread of its own."""

    def __init__(self, target: tuple[str, int], port: int) -> None:
        self.target = target
        self.port = port
        self.dropped = 0
        self.passed = 0
        self._cut: set[str] = set()
        self._streams: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"relay-{port}", daemon=True)
        self._thread.start()
        assert self._ready.wait(10), "the relay did not start"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cut(self, *hosts: str) -> None:
        """Drop what these source addresses send from now on."""
        self._cut |= set(hosts)

    def heal(self) -> None:
        """Let everything through; streams that were cut are closed, as their ends would find out."""
        self._cut.clear()
        self._loop.call_soon_threadsafe(self._close_streams)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _close_streams(self) -> None:
        for writer in self._streams:
            writer.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._start())
            self._ready.set()
            self._loop.run_forever()
            self._loop.run_until_complete(self._stop())
        finally:
            self._loop.close()

    async def _start(self) -> None:
        relay = self

        class Datagrams(asyncio.DatagramProtocol):
            def connection_made(self, transport: Any) -> None:
                self.transport = transport

            def datagram_received(self, data: bytes, source: Any) -> None:
                if source[0] in relay._cut:
                    relay.dropped += 1
                else:
                    relay.passed += 1
                    self.transport.sendto(data, relay.target)

        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        endpoint = ("127.0.0.1", self.port)
        self._datagrams, _ = await self._loop.create_datagram_endpoint(Datagrams, local_addr=endpoint)

    async def _stop(self) -> None:
        self._server.close()
        self._datagrams.close()
        self._close_streams()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        source = writer.get_extra_info("peername")[0]
        self._streams.add(writer)
        try:
            there, back = await asyncio.open_connection(*self.target)
        except OSError:
            writer.close()
            self._streams.discard(writer)
            return
        self._streams.add(back)
        pumps = (self._pump(source, reader, back), self._pump(source, there, writer))
        await asyncio.gather(*pumps, return_exceptions=True)
        for end in (writer, back):
            self._streams.discard(end)
            end.close()
            with suppress(OSError):
                await end.wait_closed()

    async def _pump(self, source: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if source in self._cut:
                    self.dropped += 1
                    continue
                self.passed += 1
                writer.write(data)
                await writer.drain()
        writer.close()
