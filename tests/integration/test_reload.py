"""A running node takes up another configuration, in all of its processes, or nothing of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.processes import ROOT, Guestbook, Node, clean_environment, closing_all, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOST = {"Host": "one.test"}
LONG = "/" + "x" * 100


@pytest.fixture
def started() -> Iterator[list[Any]]:
    with closing_all() as items:
        yield items


def config(machine: Guestbook, workers: int, proxy: str = "", rest: str = "", host: str = "one.test") -> str:
    return f"""
workers = {workers}
admin.listen = "127.0.0.1:0"
gossip.listen = "127.0.0.1:0"
[proxy]
listen = "127.0.0.1:0"
{proxy}
[[apps]]
name = "one"
hosts = ["{host}"]
machines = [{{address = "{machine.address}"}}]
{rest}
"""


def reload(node: Node) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "isthmus.cli", "reload", "--data", str(node.data)],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_what_can_change_changes_in_all_processes(tmp_path: Path, started: list[Any], workers: int) -> None:
    machine = Guestbook("ams", "m1", tmp_path)
    started.append(machine)
    first = config(machine, workers)
    node = Node("n1", tmp_path, first)
    started.append(node)
    file = tmp_path / "n1.toml"
    head = f'node = "n1"\ndata = "{node.data}"\n'

    def ask(path: str, host: str = "one.test") -> int:
        # Several: the kernel spreads connections over workers.
        (status,) = {node.get(path, headers={"Host": host}).status for _ in range(8)}
        return status

    wait_for("the machine", lambda: ask("/healthz") == 200)
    assert ask(LONG) == 404
    # All of it at once.
    log = tmp_path / "access.log"
    rest = f'[access_log]\nfile = "{log}"\n[log]\nlevel = "debug"\n'
    rest += "[regions.moon]\nlatitude = 1\nlongitude = 2\n"
    file.write_text(head + config(machine, workers, "url_bytes_max = 50", rest, host="two.test"))
    done = reload(node)
    changed = "proxy.url_bytes_max, log.level, access_log.file, regions, apps"
    assert (done.returncode, done.stdout) == (0, f"changed: {changed}\n"), done.stderr + node.said()
    assert ask(LONG, "two.test") == 414
    wait_for("the other host", lambda: ask("/healthz", "two.test") == 200)
    assert ask("/healthz") == 404
    wait_for("requests in the log", lambda: log.exists() and "two.test" in log.read_text())
    query = {"sql": "SELECT code FROM regions"}
    assert node.change("db/query", query)["rows"] == [["moon"]]
    # What is wrong is refused as a whole; the log is reopened all the same.
    log.rename(tmp_path / "access.log.1")
    file.write_text(head + config(machine, workers, "url_bytes_max = 9000\nnothing = 1", rest))
    node.process.send_signal(signal.SIGHUP)
    lifecycle = wait_for("the refusal", lambda: node.show("status")["lifecycle"]["reload_problem"])
    assert lifecycle == f"{file}:10: unknown key `proxy.nothing`"
    assert f"{file}:10" in node.said()
    assert ask(LONG, "two.test") == 414

    def is_logged_anew() -> bool:
        ask("/healthz", "two.test")
        return log.exists() and "two.test" in log.read_text()

    wait_for("the new log", is_logged_anew)
    # What takes a restart is named, and the rest changes.
    file.write_text(head.replace("n1", "n9") + config(machine, workers + 1, rest=rest))
    done = reload(node)
    assert done.stdout == (
        "changed: proxy.url_bytes_max, apps\ntakes a restart or an upgrade: node, data, workers\n"
    )
    assert ask(LONG) == 404
    assert node.show("status")["lifecycle"]["restart"] == ["node", "data", "workers"]
    assert node.show("status")["lifecycle"]["reload_problem"] == ""


def test_what_an_agent_refuses_changes_no_worker(tmp_path: Path, started: list[Any]) -> None:
    machine = Guestbook("ams", "m1", tmp_path)
    started.append(machine)
    node = Node("n1", tmp_path, config(machine, 1))
    started.append(node)
    text = (tmp_path / "n1.toml").read_text().replace(machine.address, node.admin)
    (tmp_path / "n1.toml").write_text(text.replace("[proxy]", "[proxy]\nurl_bytes_max = 50"))
    done = reload(node)
    assert (done.returncode, done.stderr) == (
        1,
        f"isthmus: {node.admin} is a listener of this node itself, not a machine\n",
    )
    assert node.get(LONG, headers=HOST).status == 404


def test_a_worker_that_starts_again_has_the_configuration_of_the_reload(
    tmp_path: Path, started: list[Any]
) -> None:
    machine = Guestbook("ams", "m1", tmp_path)
    started.append(machine)
    node = Node("n1", tmp_path, config(machine, 1))
    started.append(node)
    text = (tmp_path / "n1.toml").read_text()
    (tmp_path / "n1.toml").write_text(text.replace("[proxy]", "[proxy]\nurl_bytes_max = 50"))
    assert reload(node).returncode == 0
    (pid,) = wait_for("a worker", node.worker_pids)
    os.kill(pid, signal.SIGKILL)
    wait_for("another worker", lambda: node.worker_pids() not in ([], [pid]))
    assert node.get(LONG, headers=HOST).status == 414
