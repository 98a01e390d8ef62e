"""`isthmus key`: the key file is valid before and after, whatever is asked."""

from __future__ import annotations

import base64
import io
import stat
from typing import TYPE_CHECKING

import pytest

from isthmus.cli import main
from isthmus.config import ConfigError
from isthmus.credentials import compute_id, read_keys, write_keys

if TYPE_CHECKING:
    from pathlib import Path

KEYS = [base64.b64encode(bytes([letter]) * 32).decode() for letter in b"abcdef"]
IDS = [compute_id(base64.b64decode(key)) for key in KEYS]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "keys"
    monkeypatch.setenv("ISTHMUS_GOSSIP__KEYS_FILE", str(found))
    monkeypatch.setenv("ISTHMUS_DATA", str(tmp_path))
    return found


def ids(file: Path) -> list[str]:
    return [compute_id(key) for key in read_keys(file)]


def refuse(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["key", *args]) == 1
    return capsys.readouterr().err


def test_a_key_alone_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key"]) == 0
    assert len(base64.b64decode(capsys.readouterr().out)) == 32


def test_a_ring_is_rotated_and_shown(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["key", "add", KEYS[0]]) == 0
    assert "no node runs" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{KEYS[1]}\n"))
    assert main(["key", "add", "-"]) == 0
    assert ids(file) == IDS[:2]
    assert main(["key", "use", IDS[1]]) == 0
    capsys.readouterr()
    assert main(["key", "list"]) == 0
    assert capsys.readouterr().out == f"{IDS[1]}  seals and opens\n{IDS[0]}  opens\n"
    assert main(["key", "remove", IDS[0]]) == 0
    assert ids(file) == IDS[1:2]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["keys"]


def test_a_key_that_is_made_is_printed_and_added(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "add"]) == 0
    assert capsys.readouterr().out.strip() == base64.b64encode(read_keys(file)[0]).decode()


def test_what_would_break_the_ring_is_refused_and_changes_nothing(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_keys(file, KEYS[:4])
    for args, problem in (
        (("remove", IDS[0]), "is the key that seals"),
        (("remove", "00000000"), "has no key 00000000"),
        (("use", KEYS[1]), "has no key"),
        (("add", KEYS[4]), "holds 4 keys already"),
        (("add", "c2hvcnQ="), "32 bytes in base64"),
    ):
        assert problem in refuse(capsys, *args)
        assert ids(file) == IDS[:4]
    assert main(["key", "add", KEYS[2]]) == 0  # it is there already
    assert ids(file) == IDS[:4]


def test_without_a_key_file_the_operator_is_told_which_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_DATA", str(tmp_path))
    assert "gossip.keys_file" in refuse(capsys, "list")


def test_a_link_to_a_key_file_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text(KEYS[0])
    link.symlink_to(target)
    write_keys(link, KEYS[1:2])
    assert link.is_symlink()
    assert ids(target) == IDS[1:2]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "1 to 4 keys"),
        ("# nothing\n\n", "1 to 4 keys"),
        ("\n".join(KEYS[:5]), "1 to 4 keys"),
        (f"{KEYS[0]}\n{KEYS[0]}\n", "each of them once"),
        (f"{KEYS[0]}\nkey\n", ":2: a gossip key is 32 bytes"),
        ("\xff", "not text"),
    ],
)
def test_a_file_that_is_no_ring_is_refused_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=problem):
        read_keys(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keys: No such file"):
        read_keys(tmp_path / "keys")


def test_a_key_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    (file / "in-the-way").mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot write"):
        write_keys(file, KEYS[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]
