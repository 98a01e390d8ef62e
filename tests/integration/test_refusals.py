"""A node that cannot start says so in a sentence and leaves nothing behind; one that served goes on."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.integration.processes import ROOT, Node, clean_environment, closing_all, wait_for

if TYPE_CHECKING:
    from pathlib import Path

ANYWHERE = ("--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--gossip-listen", "127.0.0.1:0")


def put_garbage(data: Path) -> None:
    (data / "isthmus.db").write_bytes(b"no database " * 1_000)


def put_directory_for_the_feed(data: Path) -> None:
    (data / "feed.sock").mkdir()


def put_directory_for_the_note(data: Path) -> None:
    (data / "node.json").mkdir()


@pytest.mark.parametrize("workers", ["1", "0"], ids=["processes", "one process"])
@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (put_garbage, "file is not a database"),
        (put_directory_for_the_feed, "feed.sock"),
        (put_directory_for_the_note, "node.json"),
    ],
)
def test_a_data_directory_that_cannot_be_used_is_told_in_a_sentence(
    tmp_path: Path, workers: str, spoil: object, complaint: str
) -> None:
    assert callable(spoil)
    spoil(tmp_path)
    command = [sys.executable, "-m", "isthmus.cli", "run", *ANYWHERE]
    done = subprocess.run(
        [*command, "--data", str(tmp_path), "--workers", workers],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("isthmus: ")
    assert complaint in last
    assert "Traceback" not in done.stderr
    assert "restarted" not in done.stderr, "trying again does not help"


def agent_pid(node: Node) -> int:
    """The process id of the agent; 0 while there is none."""
    with suppress(OSError, http.client.HTTPException):
        return node.agent_pid()
    return 0


def test_an_agent_that_is_refused_after_it_served_is_tried_again(tmp_path: Path) -> None:
    config = "".join(f'{part}.listen = "127.0.0.1:0"\n' for part in ("proxy", "admin", "gossip"))
    with closing_all() as started:
        node = Node("n1", tmp_path, config)
        started.append(node)
        agent = node.agent_pid()
        host, _, port = node.admin.rpartition(":")
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            os.kill(agent, signal.SIGKILL)

            def is_stolen() -> bool:
                with suppress(OSError):
                    thief.bind((host, int(port)))
                    thief.listen()
                    return True
                return False

            wait_for("the port to be free", is_stolen)
            wait_for("the agent to be refused", lambda: "address already in use" in node.said())
            assert node.get("/").status == 404  # the workers go on
        wait_for("the agent to come back", lambda: agent_pid(node) not in (0, agent))
        assert node.process.poll() is None
