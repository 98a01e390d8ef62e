"""A web application that this project did not write, Datasette, behind two nodes in two regions."""

from __future__ import annotations

import http.client
import json
import sqlite3
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.integration.processes import Node, Program, closing_all, free_port, request, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOST = {"Host": "data.test"}
ROWS = 2_500


class Datasette(Program):
    """`datasette serve` on a small database."""

    def __init__(self, directory: Path, database: Path) -> None:
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        args = ("datasette", "serve", str(database), "--host", "127.0.0.1", "--port", str(port))
        super().__init__(f"datasette-{port}", directory, *args, "--setting", "max_returned_rows", "5000")
        wait_for("datasette to serve", self._serves)

    def _serves(self) -> bool:
        assert self.process.poll() is None, self.said()
        with suppress(OSError, http.client.HTTPException):
            return request(self.address, "/-/versions.json").status == 200
        return False


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    directory = tmp_path_factory.mktemp("datasette")
    database = directory / "islands.db"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE islands (id INTEGER PRIMARY KEY, name TEXT, area REAL)")
        rows = ((i, f"Île {i}", i * 1.5) for i in range(1, ROWS + 1))
        connection.executemany("INSERT INTO islands VALUES (?, ?, ?)", rows)
    connection.close()
    gossip = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    with closing_all() as started:
        made = []
        for number, region in enumerate(("ams", "syd")):
            machine = Datasette(directory, database)
            started.append(machine)
            config = f"""
region = "{region}"
proxy.listen = "127.0.0.1:0"
admin.listen = "127.0.0.1:0"
gossip = {{ listen = "{gossip[number]}", join = ["{gossip[1 - number]}"] }}
[[apps]]
name = "islands"
hosts = ["data.test"]
checks = [{{ path = "/-/versions.json", interval_ms = 300 }}]
machines = [{{ id = "{region}", address = "{machine.address}" }}]
"""
            made.append(Node(region, directory, config))
            started.append(made[-1])
        for node in made:
            wait_for(f"{node.id} to see both machines", lambda n=node: n.routable() == {"ams", "syd"})
        yield made


@pytest.mark.parametrize("number", [0, 1])
def test_pages_come_whole_through_the_proxy(nodes: list[Node], number: int) -> None:
    node = nodes[number]
    page = node.get("/islands/islands", headers=HOST)
    assert page.status == 200
    assert "text/html" in page.headers["content-type"]
    assert f"{ROWS:,} rows" in page.text
    style = node.get("/-/static/app.css", headers=HOST)
    assert style.status == 200
    assert int(style.headers.get("content-length", len(style.body))) == len(style.body)
    answer = node.get("/islands.json?sql=select+*+from+islands&_shape=array", headers=HOST)
    islands = json.loads(answer.body)
    assert [row["id"] for row in islands] == list(range(1, ROWS + 1))
    assert islands[-1]["name"] == f"Île {ROWS}"


def test_a_large_export_streams(nodes: list[Node]) -> None:
    answer = nodes[0].get("/islands/islands.csv?_stream=1&_size=max", headers=HOST)
    assert answer.status == 200
    assert len(answer.text.splitlines()) == ROWS + 1


def test_links_and_redirects_keep_the_clients_host(nodes: list[Node]) -> None:
    answer = nodes[0].get("/islands/islands/", headers=HOST)
    assert answer.status in (301, 302)
    assert "127.0.0.1" not in answer.headers["location"]
    facets = nodes[0].get("/islands/islands.json?_size=1", headers=HOST).json()
    assert facets["next_url"].startswith("http://data.test/")


def test_an_unknown_page_is_answered_by_the_app(nodes: list[Node]) -> None:
    missing = nodes[1].get("/nothing/here", headers=HOST)
    assert missing.status == 404
    assert "fly-proxy-error" not in missing.headers, "the answer is the app's own"
