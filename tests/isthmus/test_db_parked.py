"""What `isthmus db parked` asks of a node, and makes of its answers."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.cli import make_parser
from isthmus.commands import db_parked

SITE = "6a" * 16


class FakeNode:
    """Records what it is asked and gives one answer to all of it."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[str] = []

    def get(self, path: str) -> Any:
        self.asked.append(f"GET {path}")
        return self.answer

    def post(self, path: str) -> Any:
        self.asked.append(f"POST {path}")
        return self.answer

    def delete(self, path: str) -> Any:
        self.asked.append(f"DELETE {path}")
        return self.answer


def run(monkeypatch: pytest.MonkeyPatch, answer: Any, *args: str) -> list[str]:
    node = FakeNode(answer)
    monkeypatch.setattr(db_parked, "make_client", lambda _args: node)
    parsed = make_parser().parse_args(["db", "parked", *args])
    assert parsed.run(parsed) == 0
    return node.asked


def test_lists_what_is_parked_on_a_line_each(monkeypatch, capsys) -> None:
    entry = {"site": SITE, "version": 12, "bytes": 187, "reason": "unknown\ncolumn \x1b[31m"}
    assert run(monkeypatch, {"parked": [entry]}) == ["GET /v1/db/parked"]
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["SITE", "VERSION", "BYTES", "REASON"]
    assert line.split() == [SITE, "12", "187", "unknown\\ncolumn", "\\x1b[31m"]


def test_says_that_nothing_is_parked(monkeypatch, capsys) -> None:
    run(monkeypatch, {"parked": []})
    assert capsys.readouterr().out == "nothing is parked\n"


def test_tries_again_and_says_how_many_remain(monkeypatch, capsys) -> None:
    assert run(monkeypatch, {"parked": 2}, "retry") == ["POST /v1/db/parked/retry"]
    assert capsys.readouterr().out == "2 still parked\n"


def test_gives_one_up(monkeypatch, capsys) -> None:
    asked = run(monkeypatch, {"site": SITE, "version": 12}, "drop", SITE, "12")
    assert asked == [f"DELETE /v1/db/parked/{SITE}/12"]
    assert capsys.readouterr().out == f"version 12 of site {SITE} is given up on this node\n"


@pytest.mark.parametrize("action", [(), ("retry",), ("drop", SITE, "12")])
def test_prints_json(monkeypatch, capsys, action: tuple[str, ...]) -> None:
    run(monkeypatch, {"parked": []}, *action, "--json")
    assert "".join(capsys.readouterr().out.split()) == '{"parked":[]}'
