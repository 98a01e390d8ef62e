"""A proxy on loopback with fake machines behind it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import TYPE_CHECKING

from proxy.metrics import ProxyMetrics
from proxy.server import Server
from proxy.settings import ProxySettings
from routing.balancer import Balancer
from routing.table import RoutingTable
from tests.fakes.client import RawClient, Response
from tests.fakes.machine import FakeMachine

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from proxy.access_log import AccessLog
    from proxy.tracing import Tracer

# Loopback answers at once; only a test of a limit shortens it further.
SETTINGS = ProxySettings("node1", "ams", sweep_interval_s=0.02, connect_timeout_s=1.0)


class Edge:
    """Started by a fixture; everything that it hands out is stopped with it."""

    def __init__(self) -> None:
        self.settings = SETTINGS
        self.table = RoutingTable("node1")
        self.balancer = Balancer(self.table, "ams", random.Random(1))
        self.metrics = ProxyMetrics()
        self.access_log: AccessLog | None = None  # a test may set one before `start`
        self.tracer: Tracer | None = None  # as above
        self.server = Server(self.settings, self.table, self.balancer, self.metrics)
        self.machines: list[FakeMachine] = []
        self.clients: list[RawClient] = []
        self.started = False
        self.listener: socket.socket | None = None  # as above: bound to what it listens on

    async def start(self, **changes: object) -> None:
        self.settings = replace(self.settings, **changes)
        self.server = Server(
            self.settings, self.table, self.balancer, self.metrics, self.access_log, tracer=self.tracer
        )
        await self.server.start(sock=self.listener)
        self.started = True

    async def stop(self) -> None:
        for client in self.clients:
            client.close()
        if self.started:
            await self.server.close()
        for machine in self.machines:
            await machine.stop()

    def put_app(
        self, name: str, host: str, network: str = "default", options: str = "{}", **limits: int | None
    ) -> None:
        self.table.apply("apps", (name,), (name, network, ""))
        self.table.apply("hostnames", (host, "/"), (host, "/", name, ""))
        soft, hard = limits.get("soft", 100), limits.get("hard")
        self.table.apply("services", (name, 0), (name, 0, None, "requests", soft, hard, "[]", "", options))
        assert not self.table.rejected

    def put_machine(self, machine_id: str, port: int, app: str = "app", region: str = "ams") -> None:
        address = f"127.0.0.1:{port}"
        self.table.apply(
            "machines", (machine_id,), (machine_id, app, "node1", region, address, "started", 0, "")
        )
        assert not self.table.rejected

    async def machine(
        self, machine_id: str = "m1", app: str = "app", region: str = "ams", **behaviour: object
    ) -> FakeMachine:
        """Start a machine and route to it; the app is made when it is not there."""
        if self.table.app(app) is None:
            self.put_app(app, f"{app}.test")
        machine = await FakeMachine(**behaviour).start()
        self.machines.append(machine)
        self.put_machine(machine_id, machine.port, app, region)
        return machine

    async def client(self) -> RawClient:
        client = await RawClient.connect(self.server.port)
        self.clients.append(client)
        return client

    async def get(self, path: bytes = b"/", *lines: bytes) -> Response:
        return await (await self.client()).get(path, *lines)

    async def exchange(self, raw: bytes) -> Response:
        client = await self.client()
        client.send(raw)
        return await client.read_response()


async def wait_for(condition: Callable[[], bool], deadline_s: float = 20.0) -> None:
    """Wait until it holds; the loop runs meanwhile."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 - conditions are about the outside of what is tested
            await asyncio.sleep(0.005)
