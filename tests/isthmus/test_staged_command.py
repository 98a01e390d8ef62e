"""What `isthmus staged` asks a node for, prints, and what the node answers."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from isthmus.admin.staging import StagingRoutes
from isthmus.cli import make_parser
from isthmus.commands import staged
from tests.isthmus.staged_world import STEP_MS, World
from tests.isthmus.test_staging_regions import PLANT, WEB

if TYPE_CHECKING:
    from pathlib import Path

CHANGE = {
    "id": "ab:1",
    "site": "abcdef0123456789",
    "writer": None,
    "written_ms": 0,
    "state": "waiting",
    "due_in_ms": 7_000,
    "strikes": 0,
    "rows": [{"table": "apps", "key": [f"a\x1b{number}"], "change": "insert"} for number in range(4)],
    "accusers": [],
}
ACCUSER = {"node": "n2", "status": "suspect", "reason": "a worker died of it", "deaths": 1, "since_ms": 0}


class FakeClient:
    def __init__(self, *changes: dict[str, Any], bake_ms: int = 30_000) -> None:
        self.answer = {"bake_ms": bake_ms, "changes": list(changes)}
        self.posts: list[str] = []

    def get(self, path: str) -> Any:
        assert path == "/v1/staged"
        return self.answer

    def post(self, path: str) -> Any:
        self.posts.append(path)
        return {"rows": 2}


def run(monkeypatch: pytest.MonkeyPatch, client: FakeClient, *words: str) -> None:
    monkeypatch.setattr(staged, "make_client", lambda _: client)
    args = make_parser().parse_args(["staged", *words])
    assert args.run(args) == 0


def test_list_names_what_is_held_back_and_who_accuses_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change = {**CHANGE, "written_ms": time.time() * 1000 - 300_000, "accusers": [ACCUSER]}
    run(monkeypatch, FakeClient(change))
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["ID", "WRITTEN", "BY", "STATE", "WHAT"]
    for part in ("ab:1", "5 min ago", "abcdef01", "waiting, 7 s more", "insert apps a\\x1b0", "…"):
        assert part in first
    assert "a\\x1b3" not in first
    assert second.split()[-7:] == ["a", "worker", "died", "of", "it", "(1", "times)"]


def test_nothing_held_back_is_told_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, FakeClient(bake_ms=0))
    assert capsys.readouterr().out.splitlines() == [
        "nothing is held back",
        "staging.bake_ms is 0: workers of this node get all changes at once",
    ]


@pytest.mark.parametrize("action", ["release", "drop"])
def test_change_is_decided_by_its_id(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    client = FakeClient()
    run(monkeypatch, client, action, "ab:1")
    assert client.posts == [f"/v1/staged/ab%3A1/{action}"]
    assert capsys.readouterr().out


async def test_node_answers_with_the_writer_s_name_and_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    world = World(tmp_path)
    node = world.add("n1", "ams")
    await world.advance(STEP_MS)
    node.write(*WEB)
    await world.advance(2 * world.bake_ms)
    members = [SimpleNamespace(site=node.store.site.hex(), name="n1")]
    app = web.Application()
    app.add_routes(StagingRoutes(node.keeper, lambda: members).routes())
    async with TestClient(TestServer(app)) as client:
        node.write(PLANT)
        await world.advance(world.bake_ms)
        (change,) = (await (await client.get("/v1/staged")).json())["changes"]
        assert (change["writer"], change["state"]) == ("n1", "quarantined")
        for path, status in (
            ("00:1/drop", 404),
            (f"{change['id']}/release", 200),
            (f"{change['id']}/drop", 200),
        ):
            assert (await client.post(f"/v1/staged/{path}")).status == status
        await world.advance(world.bake_ms)
        assert (await (await client.get("/v1/staged")).json())["changes"] == []
        node.write("UPDATE services SET soft_limit = 20")
        await world.advance(STEP_MS)
        (change,) = (await (await client.get("/v1/staged")).json())["changes"]
        assert (await client.post(f"/v1/staged/{change['id']}/release")).status == 409
    world.close()
