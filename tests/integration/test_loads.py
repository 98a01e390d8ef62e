"""Two nodes that share machines: what one has in flight there counts at the other."""

from __future__ import annotations

import http.server
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.integration.processes import Answer, Node, closing_all, free_port, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SOFT, HARD = 10, 12


class Machine:
    """Holds each request to `/hold` until it is let go; `held` says how many, `held_max` how many at once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.held = self.held_max = 0
        self._change = threading.Condition()
        self._may_go = False
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,)).start()
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        machine = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path == "/hold":
                    machine.hold()
                self.send_response(200)
                self.send_header("Content-Length", str(len(machine.name)))
                self.end_headers()
                self.wfile.write(machine.name.encode())

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def hold(self) -> None:
        with self._change:
            self.held += 1
            self.held_max = max(self.held_max, self.held)
            self._change.wait_for(lambda: self._may_go)
            self.held -= 1

    def let_go(self) -> None:
        with self._change:
            self._may_go = True
            self._change.notify_all()

    def close(self) -> None:
        self.let_go()
        self._server.shutdown()
        self._server.server_close()


class World:
    """Nodes `a`, which has both machines, and `b`, in one region; clients that wait for their answers."""

    def __init__(self, directory: Path, started: list[Node | Machine]) -> None:
        self.machines = {name: Machine(name) for name in ("m1", "m2")}
        started += self.machines.values()
        self.clients = ThreadPoolExecutor(64)
        gossip = {name: f"127.0.0.1:{free_port()}" for name in ("a", "b")}
        app = f'[[apps]]\nname = "web"\nsoft_limit = {SOFT}\nhard_limit = {HARD}\n' + "".join(
            f'[[apps.machines]]\nid = "{machine.name}"\naddress = "{machine.address}"\n'
            for machine in self.machines.values()
        )

        def start(name: str, other: str, text: str) -> Node:
            text = f"""
workers = {1 if name == "a" else 0}
proxy.listen = "127.0.0.1:0"
proxy.queue_timeout_ms = 100
admin.listen = "127.0.0.1:0"
gossip.listen = "{gossip[name]}"
gossip.join = ["{gossip[other]}"]
{text}"""
            started.append(Node(name, directory, text))
            return started[-1]

        with ThreadPoolExecutor() as starting:
            self.a, self.b = starting.map(start, "ab", "ba", (app, ""))

    def hold(self, node: Node, count: int) -> list[int]:
        """Send requests for m1 that end when they are let go; returns the statuses of those refused."""
        m1 = self.machines["m1"]
        before = m1.held
        headers = {"fly-force-instance-id": "m1"}
        asked = [self.clients.submit(node.get, "/hold", headers=headers) for _ in range(count)]

        def refused() -> list[Answer]:
            return [answer.result() for answer in asked if answer.done()]

        wait_for("all to be held or refused", lambda: m1.held - before + len(refused()) == count)
        return [answer.status for answer in refused()]

    def spread(self, node: Node, requests: int = 12) -> set[str]:
        """Where requests go that may go anywhere."""
        return {node.get("/").text for _ in range(requests)}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with closing_all() as started:
        world = World(tmp_path, started)
        wait_for("b to know the machines", lambda: world.b.routable() == {"m1", "m2"})
        wait_for("both to know each other", lambda: len(world.a.show("nodes")) == 2)
        yield world
        for machine in world.machines.values():
            machine.let_go()
        world.clients.shutdown()


def test_requests_in_flight_at_one_node_count_at_the_other(world: World) -> None:
    m1 = world.machines["m1"]
    wait_for("b to use both", lambda: world.spread(world.b) == {"m1", "m2"})

    assert world.hold(world.a, HARD - 4) == []
    wait_for("b to turn to the other machine", lambda: world.spread(world.b) == {"m2"})
    assert world.spread(world.b, 20) == {"m2"}

    # What is left of the hard limit is for b, and nothing then for a. One request may be untold.
    assert set(world.hold(world.b, 10)) == {503}
    assert HARD <= m1.held <= HARD + 1
    wait_for("a to know what b has there", lambda: world.hold(world.a, 1) == [503])
    assert m1.held_max <= HARD * 2, "what each worker keeps to, whatever is late"

    m1.let_go()
    force = {"fly-force-instance-id": "m1"}
    wait_for("room for b again", lambda: world.b.get("/", headers=force).status == 200)
