"""A row that kills whoever takes it up reaches one region, and that survives it.

What kills is in no product code: children are started with a `sitecustomize` that ends any process, worker or
agent, in which an app of one name gets into the routing table.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING

from isthmus.staging.stage import STRIKES_MAX
from tests.fakes.machine import FakeMachine
from tests.integration.processes import ROOT, Node, closing_all, request, wait_for

if TYPE_CHECKING:
    from pathlib import Path

POISON = "poison"
BAKE_MS = 1_500
HOST = {"Host": "web.test"}
MORTAL = f"""
import os, sys
if "isthmus.child" in sys.orig_argv:
    from isthmus import route_feed

    def die():
        with open(os.environ["DEATHS"], "a") as file:
            file.write(f"{{os.getpid()}}\\n")
        os._exit(1)

    def apply(self, change, usual=route_feed.RouteFeed.apply):
        if change.table == "apps" and change.row is not None and change.pk == ({POISON!r},):
            die()
        usual(self, change)

    def read_rows(self, connection, usual=route_feed.RouteFeed._read_rows):
        for table, pk, row in usual(self, connection):
            if table == "apps" and pk == ({POISON!r},):
                die()
            yield table, pk, row

    route_feed.RouteFeed.apply, route_feed.RouteFeed._read_rows = apply, read_rows
"""
CONFIG = f"""
region = "{{region}}"
workers = 2
[staging]
bake_ms = {BAKE_MS}
regions = ["ams"]
[proxy]
listen = "127.0.0.1:0"
[admin]
listen = "127.0.0.1:0"
[gossip]
listen = "127.0.0.1:0"
join = [{{join}}]
"""


def start(name: str, region: str, directory: Path, join: str = "") -> Node:
    config = CONFIG.format(region=region, join=join and f'"{join}"')
    env = {"PYTHONPATH": f"{directory}:{ROOT}", "DEATHS": str(directory / f"{name}.deaths")}
    return Node(name, directory, config, env)


def deaths(node: Node, directory: Path) -> int:
    file = directory / f"{node.id}.deaths"
    return len(file.read_text().splitlines()) if file.exists() else 0


class Traffic:
    """Requests to one node, one after the other, until it is closed."""

    def __init__(self, node: Node, pause_s: float = 0.0) -> None:
        self.ok = 0
        self.failed: list[str] = []
        self._node = node
        self._pause_s = pause_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_over.is_set():
            try:
                status = request(self._node.proxy, headers=HOST).status
            except OSError as error:
                self.failed.append(repr(error))
            else:
                self.ok += status == 200
                self.failed += [str(status)] * (status != 200)
            self._is_over.wait(self._pause_s)

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()


def states(node: Node) -> list[str]:
    return [change["state"] for change in node.show("staged")["changes"]]


async def test_row_that_kills_workers_stays_in_one_region(tmp_path: Path) -> None:
    machine = await FakeMachine().start()
    try:
        await asyncio.to_thread(_run, tmp_path, f"127.0.0.1:{machine.port}")
    finally:
        await machine.stop()


def _run(directory: Path, machine: str) -> None:
    (directory / "sitecustomize.py").write_text(MORTAL)
    with closing_all() as started:
        canary = start("canary", "ams", directory)
        started.append(canary)
        rest = start("rest", "gru", directory, canary.gossip)
        started.append(rest)
        fresh_until = time.monotonic() + BAKE_MS / 1000
        rest.change("apps", {"name": "web", "hosts": ["web.test"], "machines": [{"address": machine}]})
        for node in (canary, rest):
            wait_for("it serves", lambda node=node: node.get("/", headers=HOST).status == 200)
            wait_for("all its workers do", lambda node=node: states(node) == [])
        wait_for("nobody to be fresh", lambda: time.monotonic() > fresh_until)
        workers = rest.worker_pids()
        traffic = {node: Traffic(node) for node in (canary, rest)}
        started.extend(traffic.values())

        rest.change("db/exec", {"statements": [{"sql": f"INSERT INTO apps (name) VALUES ('{POISON}')"}]})
        wait_for("the canary to find out", lambda: states(canary) == ["quarantined"])
        wait_for("the rest to hear of it", lambda: states(rest) == ["quarantined"])
        told = time.monotonic()
        wait_for("the canary's workers to be back", lambda: len(canary.worker_pids()) == 2)
        wait_for("the time of the rest to have come", lambda: time.monotonic() > told + BAKE_MS / 1000)

        assert deaths(canary, directory) == STRIKES_MAX
        assert (deaths(rest, directory), rest.worker_pids()) == (0, workers)
        for node in (canary, rest):
            counted = traffic[node].ok
            wait_for("more requests", lambda node=node, counted=counted: traffic[node].ok > counted)
            traffic[node].close()
        assert traffic[rest].failed == []
        # What a worker had in hand dies with it.
        assert len(traffic[canary].failed) <= STRIKES_MAX, traffic[canary].failed

        (change,) = rest.show("staged")["changes"]
        assert change["rows"] == [{"table": "apps", "key": [POISON], "change": "insert"}]
        assert [one["node"] for one in change["accusers"]] == ["canary"]
        assert change["writer"] == "rest"
        rest.change(f"staged/{change['id']}/drop")
        for node in (canary, rest):
            wait_for("nothing to be held back", lambda node=node: states(node) == [])
            found = node.change("db/query", {"sql": "SELECT name FROM apps ORDER BY name"})
            assert found["rows"] == [["web"]]
        assert deaths(canary, directory) == STRIKES_MAX
