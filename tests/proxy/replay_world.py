"""Machines of three apps behind a proxy in ams, for tests that go through Fly's pages line by line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fakes.client import Response
    from tests.fakes.machine import FakeMachine, Request
    from tests.proxy.edge import Edge

# id -> app, region. `other` is of the same network as `app`, `foreign` of another one.
MACHINES = {
    "m1": ("app", "ams"),  # the nearest: it gets what nobody else is asked for
    "m2": ("app", "gru"),
    "m3": ("app", "iad"),
    "o1": ("other", "ams"),
    "o2": ("other", "gru"),
    "f1": ("foreign", "ams"),
}
Instruction = bytes | dict[str, object]


def answer_with(instruction: Instruction, *lines: bytes, status: bytes = b"409 Conflict") -> bytes:
    """An answer that asks for a replay, with a header or as JSON."""
    if isinstance(instruction, dict):
        body = json.dumps(instruction).encode()
        told = b"Content-Type: application/vnd.fly.replay+json"
    else:
        body, told = b"not for the client", b"fly-replay: " + instruction
    head = [b"HTTP/1.1 " + status, told, *lines, b"Content-Length: %d" % len(body)]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def name_of(name: bytes, *lines: bytes, status: bytes = b"200 OK") -> bytes:
    head = [b"HTTP/1.1 " + status, *lines, b"Content-Length: %d" % len(name)]
    return b"\r\n".join(head) + b"\r\n\r\n" + name


def is_replayed(request: Request) -> bool:
    return bool(request.values(b"fly-replay-src") or request.values(b"fly-replay-failed"))


class World:
    """All of them answer with their name."""

    def __init__(self, edge: Edge) -> None:
        self.edge = edge
        self.machines: dict[str, FakeMachine] = {}

    async def start(self, **settings: object) -> World:
        for app, network in (("app", "default"), ("other", "default"), ("foreign", "elsewhere")):
            self.edge.put_app(app, f"{app}.test", network)
        self.edge.put_app("empty", "empty.test")
        for name, (app, region) in MACHINES.items():
            self.machines[name] = await self.edge.machine(name, app, region)
            self.answers(name, lambda request, name=name: name_of(name.encode()))
        await self.edge.start(**settings)
        return self

    def answers(self, name: str, answer: Callable[[Request], bytes]) -> None:
        self.machines[name].answer = answer

    def asks(
        self, name: str, instruction: Instruction, *lines: bytes, status: bytes = b"409 Conflict"
    ) -> None:
        """Let a machine ask for a replay of whatever was not replayed to it."""
        self.answers(
            name,
            lambda request: (
                name_of(name.encode())
                if is_replayed(request)
                else answer_with(instruction, *lines, status=status)
            ),
        )

    async def stop(self, name: str) -> None:
        """Let nothing listen where the machine was."""
        await self.machines[name].stop()

    def put(self, name: str, state: str = "started", cordoned: int = 0) -> None:
        app, region = MACHINES[name]
        address = f"127.0.0.1:{self.machines[name].port}"
        self.edge.table.apply("machines", (name,), (name, app, "node1", region, address, state, cordoned, ""))

    def fail_check(self, name: str) -> None:
        self.edge.table.apply("checks", (name, "up"), (name, "up", "node1", "critical", "", 0))

    def last(self, name: str) -> Request:
        """The last request that a machine got."""
        return self.machines[name].requests[-1]

    def seen(self, name: str) -> int:
        return len(self.machines[name].requests)

    async def outcome(self, *lines: bytes, path: bytes = b"/") -> str:
        """Who answered a GET, or the code of the error."""
        return outcome_of(await self.edge.get(path, *lines))


def outcome_of(response: Response) -> str:
    return response.error or response.body.decode()
