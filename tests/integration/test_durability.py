"""What was acknowledged outlives the process, and a disk that takes no writes stops nothing but writes."""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from tests.chaos.killing import Killing
from tests.integration.processes import (
    ROOT,
    Guestbook,
    Node,
    clean_environment,
    closing_all,
    request,
    wait_for,
)

# `make chaos` has hundreds.
KILLS = 24
SEED = 7  # of what is written and where it is cut; the kernel decides the rest
if TYPE_CHECKING:
    from pathlib import Path

IN_A_SMALL_DISK = 'mount -t tmpfs -o size=4m tmpfs "$1" && exec "$2" -m tests.chaos.filling "$1"'


def test_a_writer_that_is_killed_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    with closing(Killing(tmp_path, SEED)) as killing:
        asyncio.run(killing.run(KILLS))
        assert killing.kills.total() == KILLS
        assert killing.acknowledged.head > KILLS
        assert killing.acknowledged.merged


def may_mount() -> bool:
    """True where a user may have a file system of their own."""
    try:
        tried = subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
        )
    except OSError:
        return False
    return tried.returncode == 0


@pytest.mark.skipif(not may_mount(), reason="user namespaces may not mount here")
def test_a_database_is_read_only_while_its_disk_is_full_and_recovers_by_itself(tmp_path: Path) -> None:
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-ec", IN_A_SMALL_DISK, "sh", str(tmp_path), sys.executable],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "database or disk is full, since " in done.stdout


CONFIG = """
proxy.listen = "127.0.0.1:0"
admin.listen = "127.0.0.1:0"
[gossip]
listen = "127.0.0.1:0"
[[apps]]
name = "guestbook"
hosts = ["guestbook.test"]
[[apps.machines]]
id = "one"
address = "{address}"
"""


def test_a_node_whose_disk_fails_routes_on_and_says_so_and_writes_again_later(tmp_path: Path) -> None:
    with closing_all() as started:
        started.append(machine := Guestbook("local", "one", tmp_path))
        started.append(node := Node("edge", tmp_path, CONFIG.format(address=machine.address)))
        wait_for("the machine to be routable", lambda: node.routable() == {"one"})

        def write(name: str, text: str) -> int:
            insert = {"sql": "INSERT INTO apps (name, managed_by) VALUES (?, ?)", "params": [name, text]}
            body = json.dumps({"statements": [insert]}).encode()
            answer = request(node.admin, "/v1/db/exec", "POST", body, {"Content-Type": "application/json"})
            assert answer.status == 200 or "this node is read-only" in answer.text, answer.text
            return answer.status

        def serves() -> bool:
            return node.get("/", headers={"Host": "guestbook.test"}).status == 200

        def read_only() -> str | None:
            told: str | None = node.show("status")["replication"]["read_only"]
            assert node.metric("isthmus_database_read_only") == float(told is not None)
            return told

        assert write("before", "") == 200
        assert read_only() is None
        assert serves()
        agent = node.agent_pid()
        _, hard = resource.prlimit(agent, resource.RLIMIT_FSIZE)
        # No file may grow beyond this: SQLite sees a disk that fails.
        resource.prlimit(agent, resource.RLIMIT_FSIZE, (300_000, hard))
        statuses = [write(f"large-{number}", "x" * 50_000) for number in range(20)]
        assert statuses[-1] == 503
        told = read_only()
        assert told is not None
        assert told.startswith("disk I/O error, since ")
        shown = subprocess.run(
            [sys.executable, "-m", "isthmus.cli", "status", "--json", "--admin", node.admin],
            cwd=ROOT,
            env=clean_environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(shown.stdout)["replication"]["read_only"] == told
        assert serves()
        assert node.routable() == {"one"}

        resource.prlimit(agent, resource.RLIMIT_FSIZE, (hard, hard))
        wait_for("the node to find that it can write", lambda: read_only() is None)
        assert write("after", "") == 200
        names = {app["app"] for app in node.show("apps")}
        written = {f"large-{number}" for number, status in enumerate(statuses) if status == 200}
        assert names == {"guestbook", "before", "after"} | written
        assert node.agent_pid() == agent
