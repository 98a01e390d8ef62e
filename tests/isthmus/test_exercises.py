"""That a backup was made, and put back, is known afterwards; a drill finds out whether it would serve."""

from __future__ import annotations

import json
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from isthmus.cli import main
from isthmus.exercises import Exercise, Exercises, note_exercise, read_exercises
from isthmus.route_feed import routing_schema
from replication.store import Store

if TYPE_CHECKING:
    from pathlib import Path


def test_each_kind_is_kept_beside_the_other(tmp_path: Path) -> None:
    assert read_exercises(tmp_path) == Exercises()
    assert note_exercise(tmp_path, "backup", Exercise(5, "/b.db"))
    assert note_exercise(tmp_path, "restore", Exercise(7, "/b.db", 5))
    assert note_exercise(tmp_path, "backup", Exercise(9, "/c.db"))
    assert read_exercises(tmp_path) == Exercises(Exercise(9, "/c.db"), Exercise(7, "/b.db", 5))
    assert [file.name for file in tmp_path.iterdir()] == ["exercises.json"]


@pytest.mark.parametrize("content", [b"", b"nonsense", b"[]", b'{"backup": 5}', b"\xff"])
def test_a_file_that_cannot_be_read_says_nothing_and_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "exercises.json").write_bytes(content)
    assert read_exercises(tmp_path) == Exercises()
    assert note_exercise(tmp_path, "backup", Exercise(5))
    assert read_exercises(tmp_path).backup == Exercise(5)


def test_what_cannot_be_noted_is_told_and_in_nobodys_way(tmp_path: Path) -> None:
    assert not note_exercise(tmp_path / "nowhere", "backup", Exercise(5))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory with an app, a route and two machines."""
    data = tmp_path / "data"
    data.mkdir()
    with closing(Store.open(data / "isthmus.db", routing_schema())) as store:
        machine = "INSERT INTO machines (id, app, node, region, address) VALUES (?, 'web', 'n1', 'ams', ?)"
        store.execute(
            [
                ("INSERT INTO apps (name) VALUES ('web')", ()),
                ("INSERT INTO hostnames (hostname, app) VALUES ('web.test', 'web')", ()),
                (machine, ("m1", "10.0.0.1:80")),
                (machine, ("m2", "not an address")),
            ],
            1_000,
        )
    return data


def run(capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    assert main(["db", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_drill_puts_the_last_backup_back_beside_the_node(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(capsys, "backup", str(tmp_path / "copy.db"), "--data", str(data))
    before = {file.name: file.read_bytes() for file in data.iterdir() if file.suffix == ".db"}
    told = run(capsys, "drill", "--data", str(data))
    assert (told["backup"], told["taken_ms"]) == (made["path"], made["taken_ms"])
    assert (told["apps"], told["routes"], told["machines"], told["rejected"]) == (1, 1, 1, 1)
    assert {file.name: file.read_bytes() for file in data.iterdir() if file.suffix == ".db"} == before
    known = read_exercises(data)
    assert known.backup is not None
    assert known.restore is not None
    assert (known.backup.backup, known.restore.taken_ms) == (made["path"], made["taken_ms"])


def test_a_drill_tells_a_person_what_the_backup_holds(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(capsys, "backup", str(tmp_path / "copy.db"), "--data", str(data))
    assert main(["db", "drill", "--data", str(data)]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{made['path']}: taken ")
    assert told.endswith("s: 1 app, 1 route, 1 machine, 1 row that cannot be used\n")


def test_a_drill_with_a_damaged_backup_fails_and_counts_as_none(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.db"
    run(capsys, "backup", str(copy), "--data", str(data))
    raw = bytearray(copy.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    copy.write_bytes(raw)
    assert main(["db", "drill", "--data", str(data)]) == 1
    assert "cannot be put back" in capsys.readouterr().err
    assert read_exercises(data).restore is None


@pytest.mark.parametrize("verb", [["backup", "/nowhere/copy.db"], ["schema", "plan"], ["schema", "forget"]])
def test_where_there_is_no_database_it_is_told_where_one_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: list[str]
) -> None:
    monkeypatch.setenv("ISTHMUS_ADMIN", "127.0.0.1:1")
    assert main(["db", *verb, "--data", str(tmp_path / "empty")]) == 1
    told = capsys.readouterr().err
    assert f"no database in {tmp_path / 'empty'}: start the node once, or say with --data DIR" in told
    assert "no node is asked here, so ISTHMUS_ADMIN is of no use" in told


def test_without_a_backup_there_is_nothing_to_rehearse_with(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["db", "drill", "--data", str(data)]) == 1
    assert "no backup of" in capsys.readouterr().err


def test_a_restore_is_noted_where_it_was_done(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(capsys, "backup", str(tmp_path / "copy.db"), "--data", str(data))
    run(capsys, "restore", made["path"], "--data", str(tmp_path / "other"))
    known = read_exercises(tmp_path / "other").restore
    assert known is not None
    assert known.taken_ms == made["taken_ms"]
