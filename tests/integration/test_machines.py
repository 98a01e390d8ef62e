"""A machine that is a process of its node: started by a request, stopped when nobody needs it."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.processes import Node, free_port, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

APP = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{os.getpid()} {os.environ['FLY_MACHINE_ID']} {os.environ['COLOUR']}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
print("listening on", os.environ["PORT"], flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""


def config(directory: Path, port: int) -> str:
    (directory / "app.py").write_text(APP, "utf-8")
    return f"""
proxy.listen = "127.0.0.1:0"
admin.listen = "127.0.0.1:0"
gossip.listen = "127.0.0.1:0"
[machines]
idle_ms = 600
drain_ms = 200
[[apps]]
name = "web"
autostop = "stop"
[[apps.checks]]
interval_ms = 200
[[apps.machines]]
id = "web-1"
address = "127.0.0.1:{port}"
command = ["{sys.executable}", "{directory}/app.py"]
env = {{COLOUR = "blue"}}
"""


def is_alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    directory = tmp_path_factory.mktemp("machines")
    node = Node("n1", directory, config(directory, free_port()))
    yield node
    node.close()


def machine(node: Node) -> dict[str, Any]:
    return node.show("machines")[0]


def test_request_starts_a_machine_which_is_stopped_when_nobody_needs_it(node: Node) -> None:
    assert machine(node)["state"] == "stopped"
    answer = node.get("/")
    pid, name, colour = answer.text.split()
    assert (answer.status, name, colour) == (200, "web-1", "blue")
    assert "listening on" in node.said()
    wait_for("the machine to be stopped", lambda: machine(node)["state"] == "stopped")
    wait_for("its process to be gone", lambda: not is_alive(int(pid)))


def test_machine_outlives_the_agent_that_started_it_and_ends_with_its_node(node: Node) -> None:
    pid, agent = int(node.get("/").text.split()[0]), node.agent_pid()
    os.kill(agent, signal.SIGKILL)
    wait_for("another agent", lambda: _agent(node) not in {0, agent})
    assert is_alive(pid)
    wait_for("the new agent to stop it", lambda: machine(node)["state"] == "stopped")
    wait_for("its process to be gone", lambda: not is_alive(pid))

    pid = int(node.get("/").text.split()[0])
    node.close()
    assert not is_alive(pid)


def _agent(node: Node) -> int:
    with suppress(OSError, AssertionError, ValueError):
        return node.agent_pid()
    return 0
