"""A cluster changes its key while it works: nobody is missed, no write is lost, the old key opens nothing."""

from __future__ import annotations

import base64
import json
import secrets
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from isthmus.credentials import compute_id
from tests.integration.processes import (
    ROOT,
    Node,
    clean_environment,
    closing_all,
    free_port,
    request,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

NAMES = ("a", "b", "c")


def make_key() -> str:
    return base64.b64encode(secrets.token_bytes(32)).decode()


def id_of(key: str) -> str:
    return compute_id(base64.b64decode(key))


class Cluster:
    """Nodes with a key file each."""

    def __init__(self, directory: Path, key: str, names: Sequence[str], workers: int = 1) -> None:
        self.directory = directory
        self.workers = workers
        self.gossip = {name: f"127.0.0.1:{free_port()}" for name in names}
        self.nodes: dict[str, Node] = {}
        for name in names:
            self.nodes[name] = self.start(name, self.gossip[name], key)

    def start(self, name: str, gossip: str, key: str) -> Node:
        self.key_file(name).write_text(f"{key}\n")
        return Node(name, self.directory, self.config(name, gossip))

    def key_file(self, name: str) -> Path:
        return self.directory / f"{name}.keys"

    def config(self, name: str, gossip: str) -> str:
        join = json.dumps([address for other, address in self.gossip.items() if other != name])
        return f"""
workers = {self.workers}
proxy.listen = "127.0.0.1:0"
admin.listen = "127.0.0.1:0"
[gossip]
listen = "{gossip}"
join = {join}
keys_file = "{self.key_file(name)}"
"""

    def key(self, name: str, *args: str) -> str:
        """Run `isthmus key` as the operator of one node."""
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "isthmus.cli",
                "key",
                *args,
                "--config",
                str(self.directory / f"{name}.toml"),
            ],
            cwd=ROOT,
            env=clean_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def apps(self, name: str) -> set[str]:
        body = json.dumps({"sql": "SELECT name FROM apps"}).encode()
        headers = {"Content-Type": "application/json"}
        return {
            row[0]
            for row in request(self.nodes[name].admin, "/v1/db/query", "POST", body, headers).json()["rows"]
        }

    def close(self) -> None:
        for node in self.nodes.values():
            node.close()


class Load:
    """Writes on every node and looks at every node's members, without a pause, until it is closed."""

    def __init__(self, cluster: Cluster) -> None:
        self.written: set[str] = set()
        self.states: set[str] = set()
        self.failures: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(node,)) for node in cluster.nodes.values()]
        for thread in self._threads:
            thread.start()

    def _run(self, node: Node) -> None:
        number = 0
        try:
            while not self._stop.is_set():
                number += 1
                name = f"{node.id}-{number}"
                insert = {"sql": "INSERT INTO apps (name) VALUES (?)", "params": [name]}
                node.change("db/exec", {"statements": [insert]})
                self.written.add(name)
                self.states |= {member["state"] for member in node.show("nodes")}
                self._stop.wait(0.02)
        except BaseException as error:  # noqa: BLE001 - told by the test, which is in another thread
            self.failures.append(error)

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def started() -> Iterator[list[Any]]:
    with closing_all() as items:
        yield items


def links_up(node: Node) -> bool:
    peers = node.show("status")["replication"]["peers"]
    return len(peers["eager"]) + len(peers["lazy"]) == len(NAMES) - 1


def test_the_key_changes_in_three_steps_under_load(tmp_path: Path, started: list[Any]) -> None:
    old, new = make_key(), make_key()
    cluster = Cluster(tmp_path, old, NAMES)
    started.append(cluster)
    nodes = cluster.nodes
    for node in nodes.values():
        wait_for("links to both others", lambda n=node: links_up(n))
    load = Load(cluster)
    started.append(load)
    wait_for("some writes", lambda: len(load.written) > 30)
    for step in (("add", new), ("use", id_of(new)), ("remove", id_of(old))):
        for name in NAMES:
            cluster.key(name, *step)
            before = len(load.written)
            wait_for("writes to go on", lambda n=before: len(load.written) > n + 30 or load.failures)
    revoked = [
        node.metric('isthmus_transport_events_total{event="links_revoked"}') for node in nodes.values()
    ]
    assert sum(revoked) >= 1, "no stream outlived the key that it was made with, so nothing was shown"
    for node in nodes.values():
        wait_for("links to both others again", lambda n=node: links_up(n))
    before = len(load.written)
    wait_for("writes after it", lambda: len(load.written) > before + 30 or load.failures)
    load.close()
    assert not load.failures
    assert load.states == {"alive"}
    for name in NAMES:
        wait_for(f"all writes on {name}", lambda n=name: cluster.apps(n) == load.written)
        assert nodes[name].show("keys") == {"keys": [id_of(new)], "problem": None}
        assert cluster.key_file(name).stat().st_mode & 0o777 == 0o600
    late = cluster.start("late", f"127.0.0.1:{free_port()}", old)
    started.append(late)
    wait_for(
        "the old key to be refused",
        lambda: any(n.metric("isthmus_gossip_dropped_total") for n in nodes.values()),
    )
    wait_for(
        "several tries",
        lambda: late.show("status")["replication"]["counters"]["transport"]["datagrams_sent"] > 5,
    )
    assert late.show("nodes")[0]["node"] == "late"
    assert len(late.show("nodes")) == 1
    assert "late" not in {member["node"] for member in nodes["a"].show("nodes")}


@pytest.mark.parametrize("workers", [0, 1], ids=["one process", "supervised"])
def test_a_bad_key_file_is_refused_told_and_mended(tmp_path: Path, started: list[Any], workers: int) -> None:
    old, new = make_key(), make_key()
    cluster = Cluster(tmp_path, old, ("a",), workers)
    started.append(cluster)
    node = cluster.nodes["a"]
    file = cluster.key_file("a")
    for bad in ("", "no key\n", f"{old}\n{old}\n", "\0\xff"):
        file.write_bytes(bad.encode("latin-1"))
        answer = request(node.admin, "/v1/reload", "POST")
        assert answer.status == 409
        assert str(file) in answer.json()["error"]
        told = node.show("keys")
        assert told["keys"] == [id_of(old)]
        assert str(file) in told["problem"]
        assert node.metric("isthmus_credentials_reload_failed") == 1
    file.write_text(f"# spread by hand\n{new}  # sealing\n{old}\n")
    node.process.send_signal(signal.SIGHUP)
    wait_for("the new ring", lambda: node.show("keys") == {"keys": [id_of(new), id_of(old)], "problem": None})
    assert node.metric("isthmus_credentials_reload_failed") == 0
    assert node.metric("isthmus_gossip_keys") == 2
    # A worker takes the signal as well, and lives.
    assert node.get("/").status in {404, 503}
    assert node.process.poll() is None
