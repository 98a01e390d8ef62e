"""A subscription on one node follows what another writes, also over the death of its agent."""

from __future__ import annotations

import http.client
import json
import os
import signal
import sqlite3
from typing import TYPE_CHECKING, Any, Self

from tests.integration.processes import Node, closing_all, free_port, wait_for

if TYPE_CHECKING:
    from pathlib import Path

# A join and an aggregate: what changes is in neither of the rows that are written.
SQL = (
    "SELECT apps.name, count(machines.id) FROM apps LEFT JOIN machines ON machines.app = apps.name "
    "AND machines.state = 'started' GROUP BY apps.name"
)


def config(gossip: str, join: str) -> str:
    return f"""
region = "ams"
proxy.listen = "127.0.0.1:0"
admin.listen = "127.0.0.1:0"
[gossip]
listen = "{gossip}"
join = [{join}]
"""


class Stream:
    """A client that keeps what the answer is, from its events alone."""

    def __init__(self, address: str, path: str, statement: str | None = None) -> None:
        self._connection = http.client.HTTPConnection(address, timeout=20)
        body = None if statement is None else json.dumps(statement)
        self._connection.request("GET" if statement is None else "POST", path, body)
        self._response = self._connection.getresponse()
        assert self._response.status == 200, self._response.read()
        self.id = self._response.getheader("corro-query-id")

    def line(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._response.readline())
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


class Counts:
    """Machines by app, as the events say."""

    def __init__(self) -> None:
        self.rows: dict[int, list[Any]] = {}
        self.last_id = 0

    def read(self, stream: Stream) -> dict[str, int]:
        """Take one line."""
        line = stream.line()
        if "row" in line:
            row_id, cells = line["row"]
            self.rows[row_id] = cells
        elif "change" in line:
            kind, row_id, cells, change_id = line["change"]
            assert change_id == self.last_id + 1, line
            self.last_id = change_id
            if kind == "delete":
                assert self.rows.pop(row_id) == cells
            else:
                self.rows[row_id] = cells
        else:
            assert "columns" in line or "eoq" in line, line
        return dict(self.rows.values())

    def read_until(self, stream: Stream, expected: dict[str, int]) -> None:
        while self.read(stream) != expected:
            pass


def test_stream_follows_another_node_and_goes_on_after_kill(tmp_path: Path) -> None:
    with closing_all() as started:
        first_port, second_port = free_port("127.0.1.1"), free_port("127.0.1.2")
        first = Node("one", tmp_path, config(f"127.0.1.1:{first_port}", f'"127.0.1.2:{second_port}"'))
        started.append(first)
        second = Node("two", tmp_path, config(f"127.0.1.2:{second_port}", f'"127.0.1.1:{first_port}"'))
        started.append(second)
        counts = Counts()
        with Stream(first.admin, "/v1/subscriptions", SQL) as stream:
            assert counts.read(stream) == {}
            second.change("apps", {"name": "web", "machines": [{"id": "m1", "address": "127.0.0.1:9"}]})
            counts.read_until(stream, {"web": 1})
            second.change("machines", {"app": "web", "id": "m2", "address": "127.0.0.1:10"})
            counts.read_until(stream, {"web": 2})
            second.change("machines/m1/stop")
            counts.read_until(stream, {"web": 1})

        agent = first.agent_pid()
        os.kill(agent, signal.SIGKILL)
        with sqlite3.connect(first.data / "isthmus.db") as database:  # while no agent runs, or soon after
            database.execute("INSERT INTO apps (name) VALUES ('blog')")
        database.close()
        second.change("machines/m1/start")
        wait_for("another agent", lambda: is_back(first, agent))
        with Stream(first.admin, f"/v1/subscriptions/{stream.id}?from={counts.last_id}") as resumed:
            counts.read_until(resumed, {"web": 2, "blog": 0})
            # A stream without a past agrees.
            with Stream(first.admin, "/v1/subscriptions", SQL) as fresh:
                assert fresh.id == stream.id
                again = Counts()
                again.read_until(fresh, {"web": 2, "blog": 0})


def is_back(node: Node, dead: int) -> bool:
    try:
        return node.agent_pid() != dead
    except OSError:
        return False
