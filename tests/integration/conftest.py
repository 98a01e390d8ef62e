"""The worlds that end-to-end tests share."""

from __future__ import annotations

import secrets
from base64 import b64encode
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from tests.integration.processes import Guestbook, Node, closing_all, free_port, wait_for
from tests.integration.relay import Relay

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REGIONS = ("ams", "iad", "syd")


@dataclass
class World:
    """Three regions: a node with two machines of the guestbook in each, gossip through relays, sealed."""

    directory: Path
    nodes: dict[str, Node] = field(default_factory=dict)
    relays: dict[str, Relay] = field(default_factory=dict)
    machines: dict[str, Guestbook] = field(default_factory=dict)
    hosts: dict[str, str] = field(default_factory=dict)

    def cut_off(self, region: str) -> None:
        """Drop all gossip between one region and the others, both ways."""
        for other, relay in self.relays.items():
            relay.cut(*(host for name, host in self.hosts.items() if (name == region) != (other == region)))

    def dropped(self) -> int:
        """Return how many pieces of gossip the cuts have swallowed."""
        return sum(relay.dropped for relay in self.relays.values())

    def heal(self) -> None:
        for relay in self.relays.values():
            relay.heal()

    def wait_until_all_see(self, machines: set[str]) -> None:
        for node in self.nodes.values():
            wait_for(
                f"{node.id} to route to exactly {sorted(machines)}", lambda n=node: n.routable() == machines
            )


def node_config(world: World, region: str, key: str) -> str:
    join = ", ".join(f'"{relay.address}"' for name, relay in world.relays.items() if name != region)
    machines = "".join(
        f'[[apps.machines]]\nid = "{m.id}"\naddress = "{m.address}"\n'
        for m in world.machines.values()
        if m.region == region
    )
    host, port = world.relays[region].target
    return f"""
region = "{region}"
proxy.listen = "127.0.0.1:0"
admin.listen = "127.0.0.1:0"
[gossip]
listen = "{host}:{port}"
advertise = "{world.relays[region].address}"
join = [{join}]
keys = ["{key}"]
[[apps]]
name = "guestbook"
hosts = ["guestbook.test"]
[[apps.checks]]
path = "/healthz"
interval_ms = 200
{machines}"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("world")
    key = b64encode(secrets.token_bytes(32)).decode()
    with closing_all() as started:
        made = World(directory)
        for number, region in enumerate(REGIONS, 1):
            host = f"127.0.1.{number}"
            made.hosts[region] = host
            made.relays[region] = Relay((host, free_port(host)), free_port())
            started.append(made.relays[region])
            for name in (f"{region}-1", f"{region}-2"):
                made.machines[name] = Guestbook(region, name, directory)
                started.append(made.machines[name])
        for region in REGIONS:
            made.nodes[region] = Node(region, directory, node_config(made, region, key))
            started.append(made.nodes[region])
        made.wait_until_all_see(set(made.machines))
        yield made
