"""A network between agents that can be cut: a relay of datagrams and streams in front of each of them.

An agent binds 127.0.2.<n>, advertises the relay's 127.0.3.<n>, and is recognised by its source address. A
cut delays streams and loses datagrams, as a real one does.
"""

import asyncio
import contextlib
import socket
from collections import Counter


class Network:
    """All relays, and which pairs of nodes can reach each other."""

    def __init__(self) -> None:
        self.relays: dict[str, Relay] = {}
        self.groups: dict[str, int] = {}
        self.lost = 0
        self.seen: Counter[tuple[str, str]] = Counter()  # (kind, source host)
        self._healed = asyncio.Event()

    async def add(self, number: int) -> "Relay":
        relay = Relay(self, number)
        await relay.start()
        self.relays[relay.node_host] = relay
        return relay

    def cut(self, *groups: list["Relay"]) -> None:
        self._healed.clear()
        self.groups = {relay.node_host: n for n, group in enumerate(groups) for relay in group}

    def heal(self) -> None:
        self.groups = {}
        self._healed.set()

    def is_cut(self, a: str, b: str) -> bool:
        return self.groups.get(a) != self.groups.get(b)

    async def passable(self, a: str, b: str) -> None:
        while self.is_cut(a, b):
            await self._healed.wait()

    async def stop(self) -> None:
        for relay in self.relays.values():
            await relay.stop()


class Relay(asyncio.DatagramProtocol):
    """Passes on what is sent to one agent."""

    def __init__(self, network: Network, number: int) -> None:
        self.network = network
        self.node_host = f"127.0.2.{number}"
        self.host = f"127.0.3.{number}"
        self.port = 0
        self.target: tuple[str, int] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> tuple[str, int]:
        return (self.host, self.port)

    @property
    def join(self) -> str:
        return f"{self.host}:{self.port}"

    async def start(self) -> None:
        tcp = socket.socket()
        tcp.bind((self.host, 0))
        self.port = tcp.getsockname()[1]
        self._udp, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: self, local_addr=self.address
        )
        self._server = await asyncio.start_server(self._accept, sock=tcp)

    async def stop(self) -> None:
        self._server.close()
        self._udp.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.network.seen["datagram", addr[0]] += 1
        if self.target is None or self.network.is_cut(addr[0], self.node_host):
            self.network.lost += 1
            return
        self._udp.sendto(data, self.target)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        source = writer.get_extra_info("peername")[0]
        self.network.seen["stream", source] += 1
        task = asyncio.current_task()
        self._tasks.add(task)
        onward = None
        try:
            await self.network.passable(source, self.node_host)
            target_reader, onward = await asyncio.open_connection(*self.target)
            await asyncio.gather(
                self._pipe(source, reader, onward),
                self._pipe(source, target_reader, writer),
            )
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()
            if onward is not None:
                onward.transport.abort()

    async def _pipe(self, source: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # the latter is uvloop's word for a closed transport
            while data := await reader.read(65_536):
                await self.network.passable(source, self.node_host)
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
