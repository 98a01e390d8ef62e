"""What `isthmus rollout` asks a node for, prints, and returns; and the paths that it asks."""

from __future__ import annotations

import io
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from isthmus.admin.rollouts import RolloutRoutes
from isthmus.cli import main, make_parser
from isthmus.client import ClientError
from isthmus.commands import rollout as command
from tests.isthmus.rollout_world import World

if TYPE_CHECKING:
    from pathlib import Path

    Monkey = pytest.MonkeyPatch
    Printed = pytest.CaptureFixture[str]

SEVEN = "[proxy]\nqueue_max = 7\n"


def shown(status: str = "running", *said: str, reason: str = "", **more: Any) -> dict[str, Any]:
    """A rollout as a node shows it; each of `said` is `NODE STATE` and a detail."""
    nodes = [
        {"node": node, "state": state, "detail": detail, "at_ms": 0}
        for node, state, detail in ((f"{one}  ").split(" ", 2) for one in said)
    ]
    return {
        "id": "ab12",
        "kind": "config",
        "steps": [["n1"], ["n2", "n3"]],
        "bake_ms": 1_500,
        "status": status,
        "reason": reason,
        "node": "n1",
        "created_by": "anna@host",
        "created_ms": time.time() * 1000 - 300_000,
        "finished_ms": 0 if status == "running" else 1,
        "nodes": [{**node, "detail": node["detail"].strip()} for node in nodes],
        **more,
    }


class FakeClient:
    """Answers a GET with the next of `answers`, and with the last one from then on."""

    def __init__(self, *answers: Any, begun: dict[str, Any] | None = None) -> None:
        self.answers = list(answers)
        self.begun = begun or shown()
        self.gets: list[str] = []
        self.posts: list[tuple[str, Any]] = []

    def get(self, path: str) -> Any:
        self.gets.append(path)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return {"body": SEVEN, **answer} if isinstance(answer, dict) else answer

    def post(self, path: str, body: Any = None) -> Any:
        self.posts.append((path, body))
        return self.begun


@pytest.fixture
def run(monkeypatch: Monkey, capsys: Printed) -> Any:
    """Run the command against a client; returns its exit code and the lines that it prints."""
    monkeypatch.setattr(command, "_LOOK_S", 0.0)
    monkeypatch.setattr(command, "find_whoami", lambda: "anna@host")

    def act(client: FakeClient, *words: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(command, "make_client", lambda _: client)
        args = make_parser().parse_args(["rollout", *words])
        return args.run(args), capsys.readouterr().out.splitlines()

    return act


@pytest.fixture
def file(tmp_path: Path) -> str:
    file = tmp_path / "limits.toml"
    file.write_text(SEVEN)
    return str(file)


def test_list_has_the_newest_first_with_who_has_it(run: Any) -> None:
    failed = shown("back", "n1 back", "n2 failed", reason="n2: a\x1bworker died")
    code, lines = run(FakeClient([failed, shown("done", "n1 good", "n2 good")]))
    assert code == 0
    assert lines[0].split() == ["ID", "KIND", "BEGUN", "BY", "STATUS", "NODES", "WHY"]
    assert lines[1].endswith("0 good, failed: n2  n2: a\\x1bworker died")
    assert lines[2].split()[-3:] == ["done", "2", "good"]


def test_list_of_nothing_says_so(run: Any) -> None:
    assert run(FakeClient([])) == (0, ["nothing was rolled out yet"])
    assert run(FakeClient([]), "--json") == (0, ["[]"])


def test_course_is_followed_to_its_end(run: Any, file: str) -> None:
    client = FakeClient(
        shown("running"),
        shown("running", "n1 trying"),
        shown("running", "n1 trying"),
        shown("running", "n1 good 5 requests, 0 failed", "n2 trying"),
        shown("done", "n1 good 5 requests, 0 failed", "n2 good"),
    )
    code, lines = run(client, "config", file, "--bake", "1.5", "--canary", "n1", "--canary", "n2")
    assert code == 0
    ((path, order),) = client.posts
    assert (path, order) == (
        "/v1/rollouts",
        {
            "kind": "config",
            "body": SEVEN,
            "bake_s": 1.5,
            "canaries": ["n1", "n2"],
            "by": "anna@host",
            "dry_run": False,
        },
    )
    assert set(client.gets) == {"/v1/rollouts/ab12"}
    assert lines[:3] == [
        "rollout ab12 of config, each step watched for 1.5 s",
        "  step 1: n1",
        "  step 2: n2, n3",
    ]
    told = [line.partition("  ")[2] for line in lines[3:-1]]
    assert told == ["n1 is trying", "n1 is good: 5 requests, 0 failed", "n2 is trying", "n2 is good"]
    assert lines[-1] == "rollout ab12 is done"


def test_one_that_goes_back_is_told_by_the_exit_code(run: Any, file: str) -> None:
    client = FakeClient(shown("back", "n1 failed a worker died", reason="n1: a\x1b worker died"))
    code, lines = run(client, "config", file)
    assert (code, lines[-1]) == (1, "rollout ab12 goes back on all nodes: n1: a\\x1b worker died")


def test_course_as_json_is_a_line_for_each_word_of_a_node_and_one_for_the_end(run: Any, file: str) -> None:
    client = FakeClient(shown("running", "n1 trying"), shown("done", "n1 good"))
    code, lines = run(client, "config", file, "--json")
    first, second, end = map(json.loads, lines)
    assert (code, first["state"], second["state"]) == (0, "trying", "good")
    assert (end["status"], "body" in end) == ("done", False)


@pytest.mark.parametrize("flag", ["--dry-run", "--detach"])
def test_nobody_looks_on_unless_asked_to(run: Any, file: str, flag: str) -> None:
    client = FakeClient(AssertionError("asked"), begun=shown(plan=["add\x1b table notes"]))
    code, lines = run(client, "schema", file, flag)
    assert (code, client.gets) == (0, [])
    assert client.posts[0][1]["dry_run"] is (flag == "--dry-run")
    assert lines[1] == "  add\\x1b table notes"
    end = "nothing was begun" if flag == "--dry-run" else "under way: isthmus rollout show ab12"
    assert lines[-1] == end
    assert json.loads("\n".join(run(client, "schema", file, flag, "--json")[1]))["id"] == "ab12"


def test_file_may_come_from_standard_input(run: Any, monkeypatch: Monkey) -> None:
    client = FakeClient(shown("done"))
    monkeypatch.setattr("sys.stdin", io.StringIO(SEVEN))
    assert run(client, "config", "-")[0] == 0
    assert client.posts[0][1]["body"] == SEVEN


def test_file_that_cannot_be_read_is_told_by_name(run: Any, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"x\.toml: No such file"):
        run(FakeClient({}), "config", str(tmp_path / "x.toml"))
    (tmp_path / "x.toml").write_bytes(b"\xff")
    with pytest.raises(ClientError, match=r"x\.toml: "):
        run(FakeClient({}), "config", str(tmp_path / "x.toml"))


def test_node_that_is_away_for_a_moment_is_asked_again(run: Any, file: str) -> None:
    away = ClientError("no isthmus answers")
    client = FakeClient(shown("running", "n1 trying"), away, away, shown("done", "n1 good"))
    code, lines = run(client, "schema", file)
    assert (code, lines[-1]) == (0, "rollout ab12 is done")


def test_node_that_stays_away_is_given_up(run: Any, file: str, monkeypatch: Monkey) -> None:
    monkeypatch.setattr(command, "_AWAY_S", 0.0)
    with pytest.raises(ClientError, match="no isthmus answers"):
        run(FakeClient(shown("running"), ClientError("no isthmus answers")), "schema", file)


def test_who_turns_away_is_told_that_it_goes_on(
    run: Any, file: str, monkeypatch: Monkey, capsys: Printed
) -> None:
    monkeypatch.setattr(command, "make_client", lambda _: FakeClient(KeyboardInterrupt()))
    args = make_parser().parse_args(["rollout", "config", file])
    assert args.run(args) == 130
    assert "isthmus rollout cancel ab12 ends it" in capsys.readouterr().err


def test_one_is_shown_with_what_nodes_say_and_its_file(run: Any) -> None:
    client = FakeClient(shown("running", "n1 trying"))
    code, lines = run(client, "show", "ab/12")
    assert (code, client.gets) == (0, ["/v1/rollouts/ab%2F12"])
    assert lines[3].endswith("n1 is trying")
    assert lines[4:] == ["it goes on", "", "[proxy]", "queue_max = 7"]
    assert "rollout ab12 is done" in run(FakeClient(shown("done", "n1 good")), "show", "ab12")[1]
    assert json.loads("\n".join(run(client, "show", "ab12", "--json")[1]))["body"] == SEVEN


@pytest.mark.parametrize(
    ("verb", "path", "told"),
    [
        ("cancel", "/v1/rollouts/ab12/cancel?by=anna%40host", "all nodes go back"),
        ("retry", "/v1/rollouts/ab12/retry", "nodes that failed try again"),
    ],
)
def test_end_and_another_try_are_asked_for_by_id(run: Any, verb: str, path: str, told: str) -> None:
    client = FakeClient({})
    assert run(client, verb, "ab12") == (0, [told])
    assert client.posts == [(path, None)]
    assert json.loads("\n".join(run(client, verb, "ab12", "--json")[1]))["id"] == "ab12"


def test_no_node_is_a_failure_with_a_sentence(capsys: Printed, tmp_path: Path) -> None:
    assert main(["rollout", "--data", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("isthmus: no isthmus runs with the data directory")


async def test_node_answers_by_path(tmp_path: Path) -> None:
    world = World(tmp_path)
    node = world.add("n1")
    app = web.Application()
    app.add_routes(RolloutRoutes(node.keeper).routes())
    order = {"kind": "config", "body": SEVEN, "bake_s": 0, "by": "anna@host"}
    async with TestClient(TestServer(app)) as client:
        dry = await client.post("/v1/rollouts", json={**order, "dry_run": True})
        assert (dry.status, await (await client.get("/v1/rollouts")).json()) == (200, [])
        begun = await client.post("/v1/rollouts", json=order)
        assert begun.status == 202
        id_ = (await begun.json())["id"]
        cancelled = await client.post(f"/v1/rollouts/{id_}/cancel", params={"by": "ben"})
        assert (cancelled.status, (await cancelled.json())["reason"]) == (202, "cancelled by ben")
        id_ = (await (await client.post("/v1/rollouts", json=order)).json())["id"]
        await world.advance(1_000)
        answer = await client.get(f"/v1/rollouts/{id_}")
        assert (answer.status, (await answer.json())["status"]) == (200, "done")
        assert [one["status"] for one in await (await client.get("/v1/rollouts")).json()] == ["done", "back"]
        assert (await client.post(f"/v1/rollouts/{id_}/retry")).status == 202
    world.close()
