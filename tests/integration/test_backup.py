"""Backup and restore as an operator does them, between real nodes under writes."""

from __future__ import annotations

import json
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
from base64 import b64encode
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.processes import ROOT, Node, clean_environment, closing_all, free_port, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEY = b64encode(secrets.token_bytes(32)).decode()
NAMES = ("one", "two", "three")


class Cluster:
    """Nodes that join each other; each can be stopped and started again where it was."""

    def __init__(self, directory: Path, started: list[Any]) -> None:
        self.directory = directory
        self.nodes: dict[str, Node] = {}
        self._started = started
        self._gossip = {name: f"127.0.0.1:{free_port()}" for name in NAMES}

    def start(self, name: str) -> Node:
        listen = self._gossip.setdefault(name, f"127.0.0.1:{free_port()}")
        join = ", ".join(f'"{address}"' for other, address in self._gossip.items() if other != name)
        node = Node(name, self.directory, CONFIG.format(listen=listen, join=join, key=KEY))
        self._started.append(node)
        self.nodes[name] = node
        return node

    def data(self, name: str) -> str:
        return str(self.directory / name)

    def wait_until_equal(self) -> None:
        wait_for("all nodes to hold the same", lambda: len({content(n) for n in self.nodes.values()}) == 1)


CONFIG = """
proxy.listen = "127.0.0.1:0"
admin.listen = "127.0.0.1:0"
workers = 0
[gossip]
listen = "{listen}"
join = [{join}]
keys = ["{key}"]
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with closing_all() as started:
        made = Cluster(tmp_path, started)
        for name in NAMES:
            made.start(name)
        yield made


def isthmus(*args: str, limit_blocks: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run one command; with a limit, no file that it writes can have more blocks of 1024 bytes."""
    command = [sys.executable, "-m", "isthmus.cli", *args]
    if limit_blocks is not None:
        command = ["bash", "-c", f"ulimit -f {limit_blocks}; exec {shlex.join(command)}"]
    return subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=60, check=False
    )


def db(*args: str) -> Any:
    done = isthmus("db", *args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refusal(*args: str, **options: Any) -> str:
    done = isthmus("db", *args, **options)
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("isthmus: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def write(node: Node, *names: str) -> Any:
    """Add apps through the admin API; returns the answer, with the version."""
    statements = [{"sql": "INSERT INTO apps (name) VALUES (?)", "params": [name]} for name in names]
    return node.change("db/exec", {"statements": statements})


def content(node: Node) -> str:
    """Return all rows that are the same on equal nodes."""
    tables = sorted(table["name"] for table in node.show("db/schema")["tables"])
    rows = [node.change("db/query", {"sql": f"SELECT * FROM {table} ORDER BY 1, 2"}) for table in tables]
    return json.dumps(rows, sort_keys=True)


def apps(node: Node) -> list[str]:
    found = node.change("db/query", {"sql": "SELECT name FROM apps ORDER BY name"})
    return [name for (name,) in found["rows"]]


def site(node: Node) -> str:
    return str(node.show("status")["replication"]["site"])


def head(node: Node, of: str) -> int:
    return int(node.show("status")["replication"]["sites"].get(of, {"head": 0})["head"])


@contextmanager
def writing(node: Node, prefix: str) -> Iterator[list[str]]:
    """Write one app after another, in the background; the list holds those that were acknowledged."""
    done: list[str] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            name = f"{prefix}-{len(done)}"
            write(node, name)
            done.append(name)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_for("the writer to be busy", lambda: len(done) > 5)
        yield done
    finally:
        stop.set()
        thread.join()


def test_a_new_node_from_a_backup_catches_up_under_a_site_of_its_own(
    cluster: Cluster, tmp_path: Path
) -> None:
    one = cluster.nodes["one"]
    for name, node in cluster.nodes.items():
        write(node, f"before-{name}")
    cluster.wait_until_equal()
    with writing(one, "meanwhile") as acknowledged:
        before = len(acknowledged)
        made = db("backup", str(tmp_path / "copy.db"), "--data", cluster.data("one"))
        wait_for("writes to go on after the backup", lambda: len(acknowledged) > before + 5)
    for name, node in cluster.nodes.items():
        write(node, f"after-{name}")

    restored = db("restore", str(tmp_path / "copy.db"), "--data", cluster.data("four"))
    assert made["site"] == restored["backup_site"] == site(one)
    assert restored["backup_version"] >= before  # what was acknowledged before it began is in it
    four = cluster.start("four")
    cluster.wait_until_equal()
    assert {f"after-{name}" for name in NAMES} | set(acknowledged) <= set(apps(four))
    assert site(four) == restored["site"]
    assert len({site(node) for node in cluster.nodes.values()}) == 4

    written = write(four, "from-four")
    assert written["site"] == restored["site"]
    cluster.wait_until_equal()
    for node in cluster.nodes.values():
        assert head(node, site(one)) == head(one, site(one))
        assert node.show("status")["replication"]["own_versions_lost"] == 0


def test_the_restored_node_has_the_backups_rows_when_nobody_else_is_left(
    cluster: Cluster, tmp_path: Path
) -> None:
    one = cluster.nodes["one"]
    write(one, "kept")
    db("backup", str(tmp_path / "copy.db"), "--data", cluster.data("one"))
    for node in cluster.nodes.values():
        node.close()
    cluster.nodes.clear()
    shutil.rmtree(cluster.data("one"))
    db("restore", str(tmp_path / "copy.db"), "--data", cluster.data("one"))
    assert apps(cluster.start("one")) == ["kept"]


def test_restore_is_refused_while_the_node_runs(cluster: Cluster, tmp_path: Path) -> None:
    copy = str(tmp_path / "copy.db")
    db("backup", copy, "--data", cluster.data("one"))
    assert "in use by another isthmus" in refusal("restore", copy, "--data", cluster.data("one"))
    write(cluster.nodes["one"], "goes-on")
    cluster.nodes["one"].close()
    assert db("restore", copy, "--data", cluster.data("one"))["replaced"] is not None


def test_a_damaged_backup_is_refused_and_the_node_starts_with_what_it_had(
    cluster: Cluster, tmp_path: Path
) -> None:
    one = cluster.nodes["one"]
    write(one, "precious")
    copy = tmp_path / "copy.db"
    db("backup", str(copy), "--data", cluster.data("one"))
    damaged = bytearray(copy.read_bytes())
    damaged[damaged.index(b"precious")] ^= 1
    copy.write_bytes(damaged)
    one.close()
    assert "copy.db is damaged" in refusal("restore", str(copy), "--data", cluster.data("one"))
    assert "precious" in apps(cluster.start("one"))


def test_retention_keeps_the_newest(cluster: Cluster, tmp_path: Path) -> None:
    directory = tmp_path / "backups"
    directory.mkdir()
    made = [
        db("backup", str(directory), "--keep", "2", "--data", cluster.data("one"))["path"] for _ in range(4)
    ]
    assert sorted(str(file) for file in directory.iterdir()) == made[2:]


def test_a_full_disk_leaves_no_half_file_and_the_backups_there_were(cluster: Cluster, tmp_path: Path) -> None:
    directory = tmp_path / "backups"
    directory.mkdir()
    args = ("backup", str(directory), "--keep", "1", "--data", cluster.data("one"))
    made = db(*args)["path"]
    said = refusal(*args, limit_blocks=64)  # which is less than an empty database has
    assert str(directory) in said
    assert [str(file) for file in directory.iterdir()] == [made]
    write(cluster.nodes["one"], "goes-on")


def test_the_same_node_is_itself_again_and_reuses_no_version(cluster: Cluster, tmp_path: Path) -> None:
    one = cluster.nodes["one"]
    write(one, "before")
    made = db("backup", str(tmp_path / "copy.db"), "--data", cluster.data("one"))
    for number in range(5):
        last = write(one, f"after-{number}")["version"]
    cluster.wait_until_equal()
    one.close()
    restored = db("restore", str(tmp_path / "copy.db"), "--same-node", "--data", cluster.data("one"))
    assert (restored["site"], restored["backup_version"]) == (made["site"], made["version"])
    one = cluster.start("one")
    cluster.wait_until_equal()
    assert site(one) == made["site"]
    # A node writes its own row as soon as it starts: that is a version after the last one given out.
    assert head(one, site(one)) > last
    assert one.show("status")["replication"]["own_versions_lost"] > 0
    assert {f"after-{number}" for number in range(5)} <= set(apps(one))
    write(one, "again")
    cluster.wait_until_equal()
    assert len({head(node, site(one)) for node in cluster.nodes.values()}) == 1


def test_a_node_on_a_copied_data_directory_is_a_node_of_its_own(cluster: Cluster, tmp_path: Path) -> None:
    original = cluster.nodes["one"]
    write(original, "before")
    cluster.wait_until_equal()
    assert original.close() == 0
    shutil.copytree(original.data, cluster.directory / "copy")
    nodes = [cluster.start("one"), cluster.start("copy")]
    sites = {node.show("status")["replication"]["site"] for node in nodes}
    assert len(sites) == 2
    write(nodes[0], "on-the-original")
    write(nodes[1], "on-the-copy")
    cluster.wait_until_equal()
    rows = nodes[0].change("db/query", {"sql": "SELECT name FROM apps ORDER BY name"})["rows"]
    assert [name for (name,) in rows] == ["before", "on-the-copy", "on-the-original"]
