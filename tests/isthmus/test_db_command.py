"""What `isthmus db` makes of its arguments, and of the answers of a node."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.cli import make_parser
from isthmus.client import ClientError
from isthmus.commands import db


class FakeNode:
    """Records what it is asked and gives one answer to all of it."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[tuple[str, Any]] = []

    def post(self, path: str, body: Any, wait_s: float = 0.0) -> Any:
        self.asked.append((path, body))
        return self.answer


def run(monkeypatch: pytest.MonkeyPatch, answer: Any, *args: str) -> FakeNode:
    node = FakeNode(answer)
    monkeypatch.setattr(db, "make_client", lambda _args: node)
    parsed = make_parser().parse_args(["db", *args])
    assert parsed.run(parsed) == 0
    return node


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-9223372036854775808", -(2**63)),
        ("0.5", 0.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("null", None),
        ("NULL", "NULL"),
        ("x'00fF'", {"blob": "AP8="}),
        ("x''", {"blob": ""}),
        ("x'0'", "x'0'"),
        ('"5"', "5"),
        ('"', '"'),
        ("", ""),
        ("5 apples", "5 apples"),
        ("nan", "nan"),
    ],
)
def test_parameter_is_taken_for_what_it_looks_like(text: str, value: Any) -> None:
    parsed = db.parse_param(text)
    assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "statements"),
    [
        ("SELECT 1", ["SELECT 1"]),
        ("INSERT INTO t VALUES (';'); DELETE FROM t;", ["INSERT INTO t VALUES (';');", "DELETE FROM t;"]),
        ("DELETE FROM t -- a; b\n;\nDELETE FROM u", ["DELETE FROM t -- a; b\n;", "DELETE FROM u"]),
        (" ;; \n", []),
        ("", []),
    ],
)
def test_statements_are_told_apart_as_sqlite_does(text: str, statements: list[str]) -> None:
    assert db.split_statements(text) == statements


def test_table_shows_every_value_on_one_line_and_nothing_that_steers_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [[None, 1, {"blob": "AP8="}, {"real": "inf"}, "a\n\x1b[2Jü"]]
    run(monkeypatch, {"columns": ["a", "b", "c", "d", "e\n"], "rows": rows}, "query", "SELECT")
    assert capsys.readouterr().out.splitlines() == [
        "a     b  c        d    e\\n",
        "NULL  1  x'00ff'  inf  a\\n\\x1b[2Jü",
    ]


def test_exec_sends_all_statements_at_once_and_says_what_became_of_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {"rows_affected": [1, 2], "version": 7, "site": "ab", "token": "ab:7"}
    sql = ("DELETE FROM t WHERE a = :a; DELETE FROM u", "DELETE FROM v")
    node = run(monkeypatch, answer, "exec", *sql, "--param", ":a=5")
    (asked,) = node.asked
    assert [statement["sql"] for statement in asked[1]["statements"]] == [
        "DELETE FROM t WHERE a = :a;",
        "DELETE FROM u\n;",
        "DELETE FROM v",
    ]
    assert {statement["params"]["a"] for statement in asked[1]["statements"]} == {5}
    assert capsys.readouterr().out == "1 row affected\n2 rows affected\ntoken ab:7\n"


def test_query_waits_for_the_write_that_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    answer: dict[str, Any] = {"columns": [], "rows": []}
    (asked,) = run(monkeypatch, answer, "query", "SELECT 1", "--after", "ab:7", "--wait", "500ms").asked
    assert asked[0] == "/v1/db/query?after=ab%3A7&wait_ms=500"
    (asked,) = run(monkeypatch, answer, "query", "SELECT 1", "--after", "a&b").asked
    assert asked[0] == "/v1/db/query?after=a%26b&wait_ms=5000"


@pytest.mark.parametrize("wait", ["5", "-1s", "1.5s", "9999999999s", "x"])
def test_a_wait_that_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch, wait: str) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, {}, "query", "SELECT 1", "--after", "ab:7", "--wait", wait)


@pytest.mark.parametrize(
    "args",
    [
        ("query", "SELECT 1", "--wait", "5s"),
        ("exec", "DELETE FROM t WHERE a = ?; DELETE FROM u", "--param", "1"),
        ("query", "SELECT ?, :a", "--param", "1", "--param", ":a=1"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
    monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    with pytest.raises(ClientError):
        run(monkeypatch, {}, *args)
