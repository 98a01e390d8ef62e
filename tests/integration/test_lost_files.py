"""A node whose database file is overwritten, replaced or removed comes back by itself and routes on."""

from __future__ import annotations

import http.client
import json
import os
import pty
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import pytest

from tests.integration.processes import (
    ROOT,
    Guestbook,
    Node,
    clean_environment,
    closing_all,
    request,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CONFIG = """
workers = {workers}
proxy.listen = "127.0.0.1:0"
admin.listen = "127.0.0.1:0"
[gossip]
listen = "127.0.0.1:0"
join = [{join}]
"""
APP = """
[[apps]]
name = "guestbook"
hosts = ["guestbook.test"]
[[apps.machines]]
id = "one"
address = "{address}"
"""
SPARED = ("b", "c")


def back_up(path: Path) -> Path:
    """Return a file with what the node has now, as `sqlite3 .backup` makes it."""
    older = path.with_name("older")
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(older)) as target:
        source.backup(target)
    return older


def overwrite(path: Path, older: Path) -> None:
    shutil.copyfile(older, path)


def put_in_place(path: Path, older: Path) -> None:
    older.replace(path)


def remove(path: Path, older: Path) -> None:
    older.unlink()
    path.unlink()


class Writer(threading.Thread):
    """Writes rows of its own through one node, and keeps those that were acknowledged."""

    def __init__(self, node: Node) -> None:
        super().__init__(daemon=True)
        self.node = node
        self.acknowledged: list[str] = []
        self.is_over = threading.Event()

    def run(self) -> None:
        number = 0
        while not self.is_over.is_set():
            number += 1
            name = f"{self.node.id}-{number}"
            insert = {"sql": "INSERT INTO apps (name, managed_by) VALUES (?, ?)", "params": [name, "x" * 500]}
            body = json.dumps({"statements": [insert]}).encode()
            with suppress(OSError, http.client.HTTPException):  # while its agent is started afresh
                headers = {"Content-Type": "application/json"}
                if request(self.node.admin, "/v1/db/exec", "POST", body, headers).status == 200:
                    self.acknowledged.append(name)
            time.sleep(0.01)

    def close(self) -> None:
        self.is_over.set()
        self.join()


class Visitor(threading.Thread):
    """Asks the proxy of a node for the app, again and again."""

    def __init__(self, node: Node) -> None:
        super().__init__(daemon=True)
        self.node = node
        self.statuses: list[int] = []
        self.is_over = threading.Event()

    def run(self) -> None:
        while not self.is_over.is_set():
            self.statuses.append(self.node.get("/", headers={"Host": "guestbook.test"}).status)
            time.sleep(0.02)

    def close(self) -> None:
        self.is_over.set()
        self.join()


def rows_of(node: Node) -> list[tuple[object, ...]] | None:
    """Return all rows of the tables that replicate, by a connection of our own."""
    uri = f"{(node.data / 'isthmus.db').as_uri()}?mode=ro"
    with suppress(sqlite3.Error), closing(sqlite3.connect(uri, uri=True)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM _repl_table ORDER BY name")]
        return [
            (name, *row)
            for name in names
            for row in connection.execute(f'SELECT * FROM "{name}" ORDER BY 1, 2')
        ]
    return None


def are_equal(nodes: list[Node]) -> bool:
    found = [rows_of(node) for node in nodes]
    return found[0] is not None and all(rows == found[0] for rows in found)


def site_of(node: Node) -> str | None:
    with suppress(OSError, http.client.HTTPException, AssertionError):
        site: str = node.show("status")["replication"]["site"]
        return site
    return None


@pytest.fixture
def started() -> Iterator[list[object]]:
    with closing_all() as started:
        yield started


@pytest.mark.parametrize("workers", [1, 0])
@pytest.mark.parametrize("act", [overwrite, put_in_place, remove])
def test_a_node_whose_file_was_replaced_comes_back_and_all_nodes_are_equal(
    tmp_path: Path, started: list[object], act: Callable[[Path, Path], None], workers: int
) -> None:
    started.append(machine := Guestbook("local", "one", tmp_path))
    nodes: list[Node] = []
    for name in ("a", *SPARED):
        join = ", ".join(f'"{node.gossip}"' for node in nodes)
        config = CONFIG.format(workers=workers, join=join)
        config += APP.format(address=machine.address) if name == "b" else ""
        started.append(node := Node(name, tmp_path, config))
        nodes.append(node)
    a = nodes[0]
    wait_for("the machine to be routable on all", lambda: all(node.routable() == {"one"} for node in nodes))
    file = a.data / "isthmus.db"
    writers = [Writer(node) for node in nodes]
    visitor = Visitor(a)
    for thread in (*writers, visitor):
        started.append(thread)
        thread.start()
    wait_for("some writes", lambda: all(len(writer.acknowledged) > 30 for writer in writers))
    older = back_up(file)
    wait_for("more writes", lambda: all(len(writer.acknowledged) > 60 for writer in writers))
    with closing(sqlite3.connect(file)) as shell:
        shell.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    wait_for("more in the WAL", lambda: all(len(writer.acknowledged) > 90 for writer in writers))
    former = site_of(a)
    act(file, older)
    wait_for("the node to come back as another site", lambda: site_of(a) not in (None, former))
    count = len(writers[0].acknowledged)
    wait_for("it to take writes", lambda: len(writers[0].acknowledged) > count + 10)
    for writer in writers:
        writer.close()
    visitor.close()
    wait_for("all nodes to be equal", lambda: are_equal(nodes), 60)
    names = {row[1] for row in rows_of(a) or () if row[0] == "apps"}
    for writer in writers[1:]:
        assert names.issuperset(writer.acknowledged)
    assert names.issuperset(writers[0].acknowledged[count:])
    assert visitor.statuses
    assert set(visitor.statuses) == {200}
    assert a.process.poll() is None
    wait_for("the workers to follow", lambda: a.routable() == {"one"})
    assert "is not the file that this node had" in a.said()


@pytest.mark.parametrize("workers", [1, 0])
def test_a_node_in_a_terminal_ends_when_the_terminal_is_closed(tmp_path: Path, workers: int) -> None:
    ours, theirs = pty.openpty()
    config = tmp_path / "node.toml"
    config.write_text(f'data = "{tmp_path}/data"\n{CONFIG.format(workers=workers, join="")}')
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "isthmus.cli", "run", "--config", str(config)],
            cwd=ROOT,
            stdin=theirs,
            stdout=log,
            stderr=log,
            env=clean_environment(),
            start_new_session=True,
        )
    try:
        wait_for("the node to start", (tmp_path / "data" / "node.json").exists)
        process.send_signal(signal.SIGHUP)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
