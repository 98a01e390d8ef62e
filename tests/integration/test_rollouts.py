"""Settings and tables for all nodes, over real processes: what does harm is tried by one, and taken back."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.processes import (
    ROOT,
    Node,
    clean_environment,
    closing_all,
    free_port,
    request,
    wait_for,
)
from tests.integration.test_staging import HOST, Traffic

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONFIG = """
region = "{region}"
workers = 1
[staging]
regions = ["ams", "gru"]
[proxy]
listen = "127.0.0.1:0"
[admin]
listen = "127.0.0.1:0"
[gossip]
listen = "{gossip}"
join = [{join}]
"""
PAUSE_S = 0.01
ALL_GOOD = {"n1": "good", "n2": "good", "n3": "good"}
# It can be seen from outside: a request with a longer one is refused.
GOOD = "[proxy]\nurl_bytes_max = 500\n"
# The machine is on loopback, which this leaves out.
POISON = '[proxy]\nurl_bytes_max = 400\nmachine_networks = ["10.0.0.0/8"]\n'
NOTES = "CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT);\n"
MORE = "CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT, mood TEXT);\n"


class Fleet:
    """Three nodes of three regions, n1 first, with traffic to each."""

    def __init__(self, directory: Path, started: list[Any]) -> None:
        self.directory = directory
        self.started = started
        self.gossip = {name: f"127.0.0.1:{free_port()}" for name in ("n1", "n2", "n3")}
        self.nodes: list[Node] = []
        for name, region in (("n1", "ams"), ("n2", "gru"), ("n3", "syd")):
            self.nodes.append(self.start(name, region))

    def start(self, name: str, region: str) -> Node:
        gossip = self.gossip[name]
        join = ", ".join(f'"{address}"' for address in self.gossip.values() if address != gossip)
        node = Node(name, self.directory, CONFIG.format(region=region, gossip=gossip, join=join))
        self.started.append(node)
        return node

    def roll_out(self, kind: str, text: str, bake_s: float) -> str:
        """Begin by the command line, at the node that is last; returns the id."""
        file = self.directory / "rolled-out"
        file.write_text(text)
        args = ["rollout", kind, str(file), "--bake", str(bake_s), "--detach", "--json"]
        run = subprocess.run(
            [sys.executable, "-m", "isthmus.cli", *args, "--admin", self.nodes[2].admin],
            cwd=ROOT,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        return str(json.loads(run.stdout)["id"])

    def look(self, id_: str, node: int = 0) -> dict[str, Any]:
        """What a node knows of it; nothing while its agent is away."""
        with suppress(OSError, AssertionError, ValueError):
            shown = self.nodes[node].show(f"rollouts/{id_}")
            return {**shown, "said": {said["node"]: said["state"] for said in shown["nodes"]}}
        return {"status": "", "said": {}}

    def wait_until(self, id_: str, status: str, said: dict[str, str]) -> str:
        """Wait until all nodes know the same; returns the reason."""
        for number in range(3):
            found = wait_for(
                f"n{number + 1} to see {status} and {said}",
                lambda n=number: (
                    (seen := self.look(id_, n)) and (seen["status"], seen["said"]) == (status, said) and seen
                ),
            )
        return str(found["reason"])


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    directory = tmp_path_factory.mktemp("rollouts")
    with closing_all() as started:
        machine = Machine()
        started.append(machine)
        fleet = Fleet(directory, started)
        app = {"name": "web", "hosts": ["web.test"], "machines": [{"address": machine.address}]}
        fleet.nodes[0].change("apps", app)
        for node in fleet.nodes:
            wait_for("it serves", lambda node=node: node.get("/", headers=HOST).status == 200)
            wait_for("it sees the others", lambda node=node: len(present(node)) == 3)
        yield fleet


class Machine:
    """A machine in a thread. It keeps no connections: networks are looked at when one is made."""

    def __init__(self) -> None:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.address = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def traffic_to(fleet: Fleet) -> Iterator[list[Traffic]]:
    """Ask all nodes, until this is left and each has answered some more."""
    traffic = [Traffic(node, PAUSE_S) for node in fleet.nodes]
    try:
        yield traffic
        for one in traffic:
            counted = one.ok
            wait_for("more requests", lambda one=one, counted=counted: one.ok > counted)
    finally:
        for one in traffic:
            one.close()


def present(node: Node) -> set[str]:
    return {row["node"] for row in node.show("nodes") if row["state"] == "alive"}


def states_seen_by(node: Node) -> set[str]:
    """The states of all nodes as one sees them; none while its agent is away."""
    with suppress(OSError, AssertionError, ValueError):
        return {row["state"] for row in node.show("nodes")}
    return set()


def is_long_url_refused(node: Node) -> bool:
    return node.get(f"/{'x' * 450}", headers=HOST).status == 200 and (
        node.get(f"/{'x' * 550}", headers=HOST).status == 414
    )


def test_settings_that_do_harm_are_had_by_one_node_and_good_ones_outlive_a_restart(fleet: Fleet) -> None:
    files = [node.data / "rolled-out.toml" for node in fleet.nodes]
    with traffic_to(fleet) as traffic:
        fleet.wait_until(fleet.roll_out("config", GOOD, 0.1), "done", ALL_GOOD)
        assert [file.read_text() for file in files] == [GOOD] * 3
        # The canary is watched for as long as its failures take to show, and no other node begins meanwhile.
        id_ = fleet.roll_out("config", POISON, 60.0)
        reason = fleet.wait_until(id_, "back", {"n1": "failed"})
        wait_for("n1 to serve again", lambda: fleet.nodes[0].get("/", headers=HOST).status == 200)
    assert reason.startswith("n1: ")
    assert "requests were answered" in reason
    assert traffic[0].failed
    assert (traffic[1].failed, traffic[2].failed) == ([], [])
    assert [file.read_text() for file in files] == [GOOD] * 3
    assert is_long_url_refused(fleet.nodes[0])

    assert fleet.nodes[1].close() == 0
    again = fleet.nodes[1] = fleet.start("n2", "gru")
    wait_for("it serves again", lambda: again.get("/", headers=HOST).status == 200)
    assert is_long_url_refused(again)
    for node in fleet.nodes:
        wait_for("it sees the others", lambda node=node: len(present(node)) == 3)


def test_tables_are_undone_on_all_nodes_when_the_agent_of_one_dies_and_no_request_fails(fleet: Fleet) -> None:
    two = fleet.nodes[1]
    with traffic_to(fleet) as traffic:
        id_, states = fleet.roll_out("schema", NOTES, 0.1), set[str]()
        wait_for(
            "n2 to see the end",
            lambda: not states.update(states_seen_by(two)) and fleet.look(id_, 1)["status"] == "done",
        )
        # An agent that takes up tables is away for a moment, and says no goodbye.
        assert "left" not in states
        fleet.wait_until(id_, "done", ALL_GOOD)
        row = "INSERT INTO notes VALUES (7, 'seven')"
        fleet.nodes[2].change("db/exec", {"statements": [{"sql": row}]})
        for node in fleet.nodes:
            wait_for("the row to arrive", lambda node=node: rows(node) == [[7, "seven"]])

        id_ = fleet.roll_out("schema", MORE, 2.0)
        wait_for("n2 to have the tables on trial", lambda: stage(two) == "taken")
        os.kill(wait_for("n2 to answer", lambda: agent_pid(two)), signal.SIGKILL)
        reason = fleet.wait_until(id_, "back", {"n1": "back", "n2": "failed"})
        assert reason == "n2: the agent ended while it was tried"
        for node in fleet.nodes:
            assert not has_mood(node)
            assert rows(node) == [[7, "seven"]]
    assert [one.failed for one in traffic] == [[], [], []]


def has_mood(node: Node) -> bool:
    body = json.dumps({"sql": "SELECT mood FROM notes"}).encode()
    return (
        request(node.admin, "/v1/db/query", "POST", body, {"Content-Type": "application/json"}).status == 200
    )


def rows(node: Node) -> list[list[Any]]:
    return list(node.change("db/query", {"sql": "SELECT id, text FROM notes"})["rows"])


def stage(node: Node) -> str:
    with suppress(OSError, ValueError):
        return str(json.loads((node.data / "errand.json").read_text())["stage"])
    return ""


def agent_pid(node: Node) -> int:
    with suppress(OSError, AssertionError, ValueError):
        return node.agent_pid()
    return 0
