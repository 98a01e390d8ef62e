"""Deploys over machines that are processes of their node, by the command line, with requests all the time."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

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

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

APP = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = b"RELEASE"
        self.send_response(STATUS if self.path == "/up" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""


def config(directory: Path) -> str:
    for release, status in (("v1", 200), ("v2", 200), ("v3", 500)):
        (directory / release).mkdir()
        text = APP.replace("RELEASE", release).replace("STATUS", str(status))
        (directory / release / "app.py").write_text(text, "utf-8")
    machines = "".join(
        f"""
[[apps.machines]]
id = "web-{number}"
address = "127.0.0.1:{free_port()}"
command = ["{sys.executable}", "{directory}/{{release}}/app.py"]
"""
        for number in (1, 2, 3, 4)
    )
    return f"""
proxy.listen = "127.0.0.1:0"
admin.listen = "127.0.0.1:0"
gossip.listen = "127.0.0.1:0"
[machines]
ready_timeout_ms = 2000
drain_ms = 200
[[apps]]
name = "web"
[[apps.checks]]
path = "/up"
interval_ms = 200
{machines}"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    directory = tmp_path_factory.mktemp("deploys")
    node = Node("n1", directory, config(directory))
    for spare in ("web-3", "web-4"):
        node.change(f"machines/{spare}/cordon")
        node.change(f"machines/{spare}/stop")
    yield node
    node.close()


def isthmus(node: Node, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "isthmus.cli", *args, "--admin", node.admin],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextmanager
def requests_all_the_time(node: Node) -> Iterator[list[tuple[int, str]]]:
    """Ask again and again; what is yielded has all answers once this is left."""
    answers: list[tuple[int, str]] = []
    ends = threading.Event()

    def ask() -> None:
        while not ends.is_set():
            try:
                answer = request(node.proxy, "/")
                answers.append((answer.status, answer.text))
            except OSError as error:
                answers.append((0, repr(error)))
            ends.wait(0.005)

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    try:
        yield answers
    finally:
        ends.set()
        for asker in askers:
            asker.join()


def serving(node: Node) -> set[str]:
    return {machine["machine"] for machine in node.show("machines") if machine["routable"]}


def last(node: Node) -> dict[str, Any]:
    return node.show("releases")[0]


def test_releases_take_over_without_a_failed_request_and_a_bad_one_goes_back(node: Node) -> None:
    first = isthmus(node, "deploy", "web", "v1", "--watch", "0.1", "--max-unavailable", "2")
    assert first.returncode == 0, first.stdout + first.stderr
    assert node.get("/").text == "v1"

    with requests_all_the_time(node) as answers:
        second = isthmus(node, "deploy", "web", "v2", "--watch", "0.1")
        wait_for("answers of the new release", lambda: answers[-1] == (200, "v2"))
        third = isthmus(node, "deploy", "web", "v3", "--watch", "0.1")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "release 2 of web is complete" in second.stdout
    assert "1/2: restarting web-1" in second.stdout
    assert third.returncode == 1, third.stdout + third.stderr
    assert "release 3 of web is rolled back: web-1: does not answer in time: 500" in third.stdout
    assert {status for status, _ in answers} == {200}
    assert {text for _, text in answers} == {"v1", "v2"}
    assert [release["status"] for release in node.show("releases")] == ["rolled back", "complete", "complete"]
    assert node.get("/").text == "v2"


def test_blue_green_flips_to_spares_and_a_rollback_flips_back(node: Node) -> None:
    assert serving(node) == {"web-1", "web-2"}
    with requests_all_the_time(node) as answers:
        green = isthmus(node, "deploy", "web", "v1", "--strategy", "bluegreen", "--watch", "0.1")
        assert green.returncode == 0, green.stdout + green.stderr
        assert serving(node) == {"web-3", "web-4"}
        back = isthmus(node, "rollback", "web", "--watch", "0.1", "--strategy", "bluegreen", "--json")
    assert back.returncode == 0, back.stdout + back.stderr
    assert serving(node) == {"web-1", "web-2"}
    assert node.get("/").text == "v2"
    assert {status for status, _ in answers} == {200}
    assert '"status":"complete"' in back.stdout.splitlines()[-1]
    said = isthmus(node, "releases", "web").stdout
    shown = [line.split()[1:4] for line in said.splitlines()[1:3]]
    assert shown == [["5", "v2", "complete"], ["4", "v1", "complete"]]


class Maker(http.server.BaseHTTPRequestHandler):
    """A webhook, the Machines API, and the machines that both make: what is asked for is there at once."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        if self.path.startswith("/v1/"):
            self._answer({"id": "flown-1", "state": "started", "config": {"image": "web:1"}})
        else:
            self._answer({"host": self.server.server_address[0]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        self.asked.append(f"{self.path} {body.get('action', '')}".strip())
        port = self.server.server_address[1]
        if self.path.endswith("/machines"):
            self._answer({"id": "flown-2", "private_ip": "127.0.0.2", "state": "created"})
        else:
            self._answer({"machine": "hooked-2", "address": f"127.0.0.2:{port}"})

    def _answer(self, said: dict[str, Any]) -> None:
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def made_machines() -> Iterator[int]:
    """Serve at two addresses, with the same port: the machines that are there, and those to come."""
    port = free_port("127.0.0.2")
    servers = [http.server.ThreadingHTTPServer((host, port), Maker) for host in ("127.0.0.1", "127.0.0.2")]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    try:
        yield port
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def test_scale_has_drivers_make_machines_that_then_serve(tmp_path: Path) -> None:
    with made_machines() as port, closing_all() as started:
        apps = "".join(
            f"""
[[apps]]
name = "{name}"
hosts = ["{name}.test"]
[[apps.machines]]
id = "{name}-1"
address = "127.0.0.1:{port}"
driver = "{name}"
"""
            for name in ("hooked", "flown")
        )
        text = f"""
proxy.listen = "127.0.0.1:0"
admin.listen = "127.0.0.1:0"
gossip.listen = "127.0.0.1:0"
[drivers.hooked]
type = "webhook"
url = "http://127.0.0.1:{port}/hook"
secret = "s"
[drivers.flown]
type = "fly"
url = "http://127.0.0.1:{port}"
token = "t"
{apps}"""
        node = Node("n1", tmp_path, text)
        started.append(node)
        scaled = isthmus(node, "scale", "count", "2", "--app", "hooked")
        assert (scaled.stdout, scaled.stderr, scaled.returncode) == ("local: create hooked-2\n", "", 0)
        (change,) = node.change("apps/flown/scale", {"count": 2})["changes"]
        assert (change["done"], change["machine"]) == ("create", "flown-2")
        for name in ("hooked", "flown"):
            wait_for(f"a request to {name}-2", lambda name=name: _answering(node, name) == "127.0.0.2")
        # The Machines API starts what it makes; a webhook is told to.
        assert Maker.asked.count("/hook create") == Maker.asked.count("/v1/apps/flown/machines") == 1
        assert Maker.asked[Maker.asked.index("/hook create") :].count("/hook start") == 1


def _answering(node: Node, app: str) -> str:
    return str(node.get("/", headers={"Host": f"{app}.test"}).json()["host"])
