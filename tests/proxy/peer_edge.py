"""Two or more nodes in one process, and machines that only one of them may connect to."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

from proxy.server import Server
from tests.proxy.edge import Edge

if TYPE_CHECKING:
    import asyncio
    import ssl

    from proxy.peer_pool import Identity
    from tests.fakes.machine import FakeMachine

# Where no machine of a test is.
NOWHERE = ("192.0.2.0/24",)


class Trusting:
    """An identity for nodes on one machine without a key."""

    def contexts(self) -> tuple[ssl.SSLContext, ssl.SSLContext] | None:
        return None

    def label(self, transport: asyncio.BaseTransport) -> str:
        return ""

    def accepts(self, label: str) -> bool:
        return True


class PeerNode(Edge):
    """A node of a world; requests may go through it once it has `listen`ed."""

    def __init__(self, name: str, region: str, identity: Identity) -> None:
        super().__init__()
        self.name = name
        self.region = region
        self.identity = identity
        self.table.own_node = name
        self.table.ways._own_node = name
        self.peering_port = 0

    async def start(self, **changes: object) -> None:
        from dataclasses import replace  # noqa: PLC0415 - as in the class that this one is

        self.settings = replace(self.settings, node=self.name, region=self.region, **changes)
        self.server = Server(
            self.settings,
            self.table,
            self.balancer,
            self.metrics,
            self.access_log,
            identity=self.identity,
        )
        await self.server.start()
        self.started = True

    def listen(self) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", self.peering_port))
        self.peering_port = sock.getsockname()[1]
        self.server.start_peering(sock)

    @property
    def peers(self) -> dict[str, tuple[int, int, dict[str, int]]]:
        """(requests, connections, failures) of each node that this one went through."""
        nodes = self.server.peer_metrics.nodes
        return {
            name: (counts.requests, counts.connections, counts.failures) for name, counts in nodes.items()
        }

    @property
    def relayed(self) -> int:
        return self.server.peer_metrics.relayed


class World:
    """`near` takes requests; machines are behind `far`, unless a test says otherwise."""

    def __init__(self) -> None:
        self.nodes: dict[str, PeerNode] = {}

    async def node(
        self,
        name: str,
        region: str = "syd",
        *,
        listen: bool = True,
        identity: Identity | None = None,
        **settings: object,
    ) -> PeerNode:
        node = self.nodes[name] = PeerNode(name, region, identity or Trusting())
        await node.start(**settings)
        if listen:
            node.listen()
        for other in self.nodes.values():
            self.tell(other.name)
        return node

    def tell(self, name: str, **peering: object) -> None:
        """Have all nodes know of one."""
        node = self.nodes[name]
        if node.peering_port:
            peering = {"address": f"127.0.0.1:{node.peering_port}", **peering}
        for other in self.nodes.values():
            other.table.apply("nodes", (name,), (name, node.region, "", 0, "", json.dumps(peering)))
            assert not other.table.rejected

    def put_app(self, name: str = "app", options: str = "{}", **limits: int | None) -> None:
        for node in self.nodes.values():
            node.put_app(name, f"{name}.test", options=options, **limits)

    def put_machine(self, machine: str, owner: str, address: str, app: str = "app") -> None:
        for node in self.nodes.values():
            row = (machine, app, owner, self.nodes[owner].region, address, "started", 0, "")
            node.table.apply("machines", (machine,), row)
            assert not node.table.rejected

    async def machine(
        self, name: str = "m1", owner: str = "far", app: str = "app", **behaviour: object
    ) -> FakeMachine:
        if self.nodes[owner].table.app(app) is None:
            self.put_app(app)
        machine = await self.nodes[owner].machine(name, app, **behaviour)
        self.put_machine(name, owner, f"127.0.0.1:{machine.port}", app)
        return machine

    async def stop(self) -> None:
        for node in self.nodes.values():
            await node.stop()
