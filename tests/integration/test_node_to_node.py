"""Machines on loopback of their nodes, reached from a node that may not connect to any machine itself."""

from __future__ import annotations

import json
import secrets
import socket
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import aiohttp
import msgspec
import pytest

from isthmus.doctor.facts import Snapshot
from isthmus.doctor.finding import diagnose
from isthmus.doctor.rules import RULES
from tests.integration.processes import Guestbook, Node, closing_all, free_port, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOST = {"Host": "guestbook.test"}
REGIONS = {"edge": "ams", "syd": "syd", "iad": "iad"}


class World:
    """An edge in ams, and a node with a machine in each of two other regions."""

    def __init__(self, directory: Path, started: list[Node | Guestbook]) -> None:
        self.directory = directory
        self.key = b64encode(secrets.token_bytes(32)).decode()
        self.gossip = {name: f"127.0.0.1:{free_port()}" for name in REGIONS}
        # All at once: a start is mostly waiting.
        with ThreadPoolExecutor() as starting:
            made = starting.map(lambda name: Guestbook(name, f"{name}-1", directory), ("syd", "iad"))
            self.machines = {machine.region: machine for machine in made}
            started += self.machines.values()
            self.nodes = {node.id: node for node in starting.map(self.start, REGIONS)}
            started += self.nodes.values()

    def start(self, name: str) -> Node:
        join = ", ".join(f'"{address}"' for other, address in self.gossip.items() if other != name)
        own = (
            'proxy.machine_networks = ["192.0.2.0/24"]'
            if name == "edge"
            else f"""
peering.listen = "127.0.0.1:0"
[[apps]]
name = "guestbook"
hosts = ["guestbook.test"]
[[apps.machines]]
id = "{name}-1"
address = "{self.machines[name].address}"
"""
        )
        return Node(
            name,
            self.directory,
            f"""
region = "{REGIONS[name]}"
workers = {1 if name == "syd" else 0}
proxy.listen = "127.0.0.1:0"
admin.listen = "127.0.0.1:0"
gossip.listen = "{self.gossip[name]}"
gossip.join = [{join}]
gossip.keys = ["{self.key}"]
{own}""",
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with closing_all() as started:
        made = World(tmp_path_factory.mktemp("world"), started)
        edge = made.nodes["edge"]
        wait_for("the edge to know both machines", lambda: edge.routable() == {"syd-1", "iad-1"})
        wait_for("the edge to know both nodes", lambda: len(edge.show("nodes")) == 3)
        yield made


def verdict(node: Node, machine: str) -> str:
    (shown,) = (shown for shown in node.show("machines") if shown["machine"] == machine)
    return str(shown["verdict"])


def test_requests_go_through_the_nodes_of_the_machines(world: World) -> None:
    edge = world.nodes["edge"]
    for machine in ("syd-1", "iad-1"):
        answer = edge.get("/", headers={**HOST, "fly-force-instance-id": machine})
        assert (answer.status, answer.text) == (200, f"hello from machine {machine} in {machine[:3]}\n")
    wait_for("both nodes to count", lambda: world.nodes["syd"].metric("isthmus_relayed_total") >= 1)
    assert "through node syd" in verdict(edge, "syd-1")
    assert "through" not in verdict(world.nodes["iad"], "iad-1")


def test_replayed_write_keeps_its_body(world: World) -> None:
    headers = {**HOST, "fly-prefer-instance-id": "syd-1"}
    answer = world.nodes["edge"].get("/guestbook", method="POST", body=b"x" * 200_000, headers=headers)
    assert (answer.status, answer.text) == (201, "written on iad-1 in iad\n")


async def test_websocket_echoes_through_both_nodes(world: World) -> None:
    url = f"http://{world.nodes['edge'].proxy}/echo"
    headers = {**HOST, "fly-force-instance-id": "syd-1"}
    async with aiohttp.ClientSession() as session, session.ws_connect(url, headers=headers) as web_socket:
        for text in ("one", "x" * 100_000):
            await web_socket.send_str(text)
            assert await web_socket.receive_str(timeout=20) == f"syd-1: {text}"


def test_stranger_at_the_listener_for_nodes_gets_nothing(world: World) -> None:
    host, port = world.nodes["syd"].info["peering"].rsplit(":", 1)
    with socket.create_connection((host, int(port)), 20) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: guestbook.test\r\n\r\n")
        assert b"HTTP" not in stranger.recv(1000)


def test_others_take_over_when_a_node_is_killed_and_errors_are_clear(world: World) -> None:
    edge = world.nodes["edge"]
    world.nodes["iad"].kill()
    for _ in range(5):
        assert edge.get("/", headers={**HOST, "fly-prefer-instance-id": "iad-1"}).status == 200
    answer = edge.get("/", headers={**HOST, "fly-force-instance-id": "iad-1"})
    assert answer.status == 502
    assert "node iad refused the connection" in answer.text


def test_a_proof_of_one_node_has_a_request_at_another_explained(world: World) -> None:
    proof = world.nodes["syd"].change("explain/proof", {"host": "guestbook.test"})
    headers = {**HOST, proof["header"]: proof["value"], "fly-force-instance-id": "syd-1"}
    answer = world.nodes["edge"].get("/", headers=headers)
    step = json.loads(answer.headers["isthmus-trace"])
    assert (step["machine"], step["node"], step["status"]) == ("syd-1", "syd", 200)
    assert "through node syd" in step["why"]
    here = world.nodes["syd"].get("/", headers={**headers, "fly-force-instance-id": "syd-1"})
    assert json.loads(here.headers["isthmus-trace"])["machine"] == "syd-1"
    other = {**headers, "Host": "other.test"}
    assert "isthmus-trace" not in world.nodes["edge"].get("/", headers=other).headers


def test_machines_behind_one_node_are_a_finding(world: World) -> None:
    snapshot = msgspec.convert(world.nodes["edge"].show("facts"), Snapshot)
    found = {
        one.finding.subject: one.finding for one in diagnose(snapshot, RULES) if one.rule == "unreachable"
    }
    assert set(found) == {"syd", "iad"}
    assert found["syd"].problem == "1 machine there can only be reached through node syd"
