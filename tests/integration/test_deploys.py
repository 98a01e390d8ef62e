"""Deploys over machines that are processes of their node, by the command line, with requests all the time."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.processes import ROOT, Node, clean_environment, free_port, request, wait_for

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
