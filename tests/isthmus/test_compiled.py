"""Compiled modules run only when they were made of the sources that are here."""

import json
import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import proxy.core.exchange
from isthmus import compiled, compiler
from isthmus.compiled import StaleError, choose_files, hash_sources, read_files

SUFFIX = EXTENSION_SUFFIXES[0]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for path in ("proxy/core/head.py", "routing/table.py"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text("A = 1\n", "utf-8")
    return tmp_path


@pytest.fixture
def folder(root: Path) -> Path:
    """What a compilation of these sources leaves."""
    folder = root / "compiled"
    folder.mkdir()
    write_manifest(folder, suffix=SUFFIX, modules=["proxy.core.head"], sources=hash_sources(root))
    return folder


def write_manifest(folder: Path, **values: object) -> None:
    (folder / compiled.MANIFEST).write_text(json.dumps(values), "utf-8")


def test_finds_what_was_compiled_of_these_sources(root: Path, folder: Path) -> None:
    assert read_files(root, folder) == {"proxy.core.head": folder / f"proxy/core/head{SUFFIX}"}


def test_an_edited_source_is_never_shadowed(root: Path, folder: Path) -> None:
    (root / "routing/table.py").write_text("A = 2\n", "utf-8")
    with pytest.raises(StaleError, match=r"routing/table\.py changed"):
        read_files(root, folder)


@pytest.mark.parametrize("change", [Path.unlink, lambda file: file.with_name("new.py").touch()])
def test_a_file_that_came_or_went_is_a_change(root: Path, folder: Path, change) -> None:
    change(root / "routing/table.py")
    with pytest.raises(StaleError, match="routing/"):
        read_files(root, folder)


def test_what_another_python_compiled_is_not_loaded(root: Path, folder: Path) -> None:
    write_manifest(folder, suffix=".other.so", modules=[], sources=hash_sources(root))
    with pytest.raises(StaleError, match=r"another Python, \.other\.so"):
        read_files(root, folder)


def test_runs_plain_without_a_word_where_nothing_was_compiled(root: Path, capsys) -> None:
    assert choose_files("", {}, root, root / "nowhere") == {}
    assert capsys.readouterr().err == ""


def test_warns_where_it_serves_once_for_itself_and_its_children(capsys, monkeypatch) -> None:
    def choose(_wish: str, _loaded: object) -> dict[str, Path]:
        raise StaleError("routing/table.py changed since then")

    monkeypatch.setenv(compiled.VARIABLE, "")
    monkeypatch.setattr(compiled, "choose_files", choose)
    finder = compiled.Finder()
    assert finder.files == {}
    assert capsys.readouterr().err == "", "a command that only asks is not slower for it"
    assert os.environ[compiled.VARIABLE] == ""
    finder.warn()
    assert capsys.readouterr().err.count("routing/table.py changed") == 1
    assert os.environ[compiled.VARIABLE] == "0"


def test_never_mixes_plain_and_compiled_modules(root: Path, folder: Path) -> None:
    assert choose_files("", {}, root, folder)
    assert choose_files("", {"proxy.core.head": object()}, root, folder) == {}


def test_plain_python_can_be_asked_for(root: Path, folder: Path) -> None:
    assert choose_files("0", {}, root, folder) == {}


def test_who_asks_for_compiled_modules_is_not_served_plain_ones(root: Path, folder: Path) -> None:
    with pytest.raises(StaleError):
        choose_files("1", {}, root, root / "nowhere")
    (root / "routing/table.py").write_text("A = 2\n", "utf-8")
    with pytest.raises(StaleError):
        choose_files("1", {}, root, folder)
    with pytest.raises(StaleError):
        choose_files("", {}, root, folder)


def test_says_what_runs() -> None:
    file = proxy.core.exchange.__file__
    assert file is not None
    assert compiled.is_compiled() == file.endswith(SUFFIX)
    assert compiled.is_compiled() == (os.environ[compiled.VARIABLE] == "1")


def test_the_manifest_watches_every_compiled_source() -> None:
    sources = compiler.list_sources(compiled.ROOT)
    assert {"proxy/downstream.py", "proxy/core/exchange.py", "routing/balancer.py"} <= {*sources}
    assert {*sources} <= hash_sources(compiled.ROOT).keys()


def test_without_a_compiler_setup_says_so_and_goes_on(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "isthmus.compiler"],
        env={**os.environ, "CC": str(tmp_path / "cc")},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == ("proxy and routing run as plain Python, not compiled: there is no C compiler\n")
