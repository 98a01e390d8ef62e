"""The command line as a person uses it: run a node, front an app, look, be told what is wrong."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.integration.processes import (
    ROOT,
    Guestbook,
    Program,
    clean_environment,
    closing_all,
    request,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def isthmus(*args: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "isthmus.cli", *args],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class Running(Program):
    """`isthmus run` with flags only."""

    def __init__(self, directory: Path, *flags: str) -> None:
        self.data = directory / "data"
        listeners = (
            *("--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--gossip-listen", "127.0.0.1:0"),
            *("--data", str(self.data)),
        )
        super().__init__("run", directory, "isthmus.cli", "run", *listeners, *flags)
        wait_for("the node to start", self._started)
        info = json.loads((self.data / "node.json").read_text("utf-8"))
        self.proxy, self.admin = info["listen"], info["admin"]

    def _started(self) -> bool:
        assert self.process.poll() is None, self.said()
        return (self.data / "node.json").exists()

    def ask(self, *args: str) -> str:
        """Run a command against this node, and return what it printed."""
        done = isthmus(*args, "--data", str(self.data))
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def started() -> Iterator[list[object]]:
    with closing_all() as items:
        yield items


@pytest.fixture(params=["1", "0"], ids=["processes", "one process"])
def node(request: pytest.FixtureRequest, tmp_path: Path, started: list[object]) -> Running:
    running = Running(tmp_path, "--workers", request.param)
    started.append(running)
    return running


def test_one_command_fronts_an_app(tmp_path: Path, started: list[object]) -> None:
    machines = [Guestbook("ams", f"m{i}", tmp_path) for i in (1, 2)]
    started.extend(machines)
    flags = [part for machine in machines for part in ("--machine", machine.address)]
    running = Running(tmp_path, "--app", "blog", "--host", "blog.example", *flags)
    started.append(running)
    answers = {request(running.proxy, headers={"Host": "blog.example"}).text for _ in range(20)}
    assert answers == {"hello from machine m1 in ams\n", "hello from machine m2 in ams\n"}
    assert request(running.proxy, headers={"Host": "other.example"}).status == 404
    assert running.close() == 0
    assert not (running.data / "node.json").exists()


def test_an_app_is_added_shown_and_removed(tmp_path: Path, node: Running, started: list[object]) -> None:
    machine = Guestbook("local", "m1", tmp_path)
    started.append(machine)
    assert node.ask("routes") == "no routes yet\n"
    node.ask("app", "add", "blog", "--host", "blog.example", "--check", "/healthz")
    added = node.ask("machine", "add", "blog", machine.address, "--id", "m1")
    assert added == "machine m1\n"
    wait_for("the route to work", lambda: request(node.proxy, headers={"Host": "blog.example"}).status == 200)
    wait_for("the check to pass", lambda: "http-0 passing" in node.ask("machines"))

    assert node.ask("routes").splitlines() == [
        "HOST          PATH  APP   MACHINE  REGION  ADDRESS",
        f"blog.example  /     blog  m1       local   {machine.address}",
    ]
    (shown,) = json.loads(node.ask("machines", "--json"))
    assert (shown["machine"], shown["state"], shown["routable"]) == ("m1", "started", True)
    (itself,) = json.loads(node.ask("nodes", "--json"))
    assert (itself["state"], itself["self"], itself["address"]) == ("alive", True, node.proxy)

    node.ask("machine", "stop", "m1")
    wait_for("no route", lambda: request(node.proxy, headers={"Host": "blog.example"}).status == 503)
    node.ask("app", "remove", "blog")
    wait_for("no app", lambda: request(node.proxy, headers={"Host": "blog.example"}).status == 404)
    assert node.ask("machines") == "no machines yet\n"


def test_what_was_added_survives_a_restart(tmp_path: Path, started: list[object]) -> None:
    first = Running(tmp_path)
    started.append(first)
    first.ask("app", "add", "blog", "--machine", "127.0.0.1:9")
    assert first.close() == 0
    second = Running(tmp_path)
    started.append(second)
    assert "blog" in second.ask("apps")


def test_an_app_that_left_the_configuration_leaves_the_table(tmp_path: Path, started: list[object]) -> None:
    first = Running(tmp_path, "--node", "n1", "--app", "blog", "--machine", "127.0.0.1:9")
    started.append(first)
    first.ask("app", "add", "by-hand", "--host", "hand.example")
    first.close()
    second = Running(tmp_path, "--node", "n1")
    started.append(second)
    assert [app["app"] for app in json.loads(second.ask("apps", "--json"))] == ["by-hand"]


def test_a_taken_port_is_named_with_the_way_out(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        done = isthmus("run", "--listen", taken, "--data", str(tmp_path))
    assert done.returncode == 1
    assert f"proxy.listen: {taken} is taken" in done.stderr
    assert "--listen HOST:PORT" in done.stderr


def test_a_second_node_on_the_same_data_is_refused(node: Running) -> None:
    done = isthmus("run", "--data", str(node.data), "--listen", "127.0.0.1:0")
    assert done.returncode == 1
    assert f"{node.data} is in use by another isthmus" in done.stderr


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('regoin = "ams"', ":1: unknown key `regoin`, did you mean `region`?"),
        ('[proxy]\nlisten = "127.0.0.1"', ":2: proxy"),
        ('region = "amz"', ":1: region: unknown region `amz`"),
        (
            '[[apps]]\nname = "a"\n[[apps.machines]]\naddress = "nonsense"',
            ":4: apps[0].machines[0].address: ",
        ),
        ("[proxy\n", "line 1"),
    ],
)
def test_a_wrong_configuration_file_is_told_by_line(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "isthmus.toml"
    file.write_text(text, "utf-8")
    done = isthmus("run", "--config", str(file), "--data", str(tmp_path / "data"))
    assert done.returncode == 1
    assert str(file) in done.stderr
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1, "one line, no traceback"


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (("machine", "add", "blog", "nonsense"), "`nonsense` names no port"),
        (("machine", "add", "blog", "127.0.0.1:9", "--region", "amz"), "unknown region `amz`"),
        (("machine", "add", "none", "127.0.0.1:9"), "there is no app `none`"),
        (("machine", "stop", "none"), "there is no machine `none`"),
        (("app", "add", "No Name"), "is no name for an app"),
    ],
)
def test_a_wrong_change_is_refused_and_changes_nothing(
    node: Running, args: tuple[str, ...], complaint: str
) -> None:
    node.ask("app", "add", "blog")
    before = node.ask("machines", "--json") + node.ask("apps", "--json")
    done = isthmus(*args, "--data", str(node.data))
    assert done.returncode == 1
    assert complaint in done.stderr
    assert node.ask("machines", "--json") + node.ask("apps", "--json") == before


def test_asking_where_nothing_runs_says_what_to_do(tmp_path: Path) -> None:
    done = isthmus("routes", "--data", str(tmp_path))
    assert done.returncode == 1
    assert "start one with `isthmus run`" in done.stderr
