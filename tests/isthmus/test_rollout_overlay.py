"""Settings that were rolled out: what is on disk at every moment, and who else has a say."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from isthmus.config import Config, ConfigError, LogConfig, ProxyConfig
from isthmus.config_sources import load_config
from isthmus.rollouts import overlay
from isthmus.rollouts.overlay import Overlay
from isthmus.rollouts.settings import check_settings, list_own

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class _DiedError(Exception):
    """The process ends here."""


def die_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """End at the numberth operation on a file, counted from 0; returns those that were begun."""
    begun: list[str] = []

    def mortal(name: str, usual: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **kwargs: Any) -> Any:
            begun.append(name)
            if len(begun) > number:
                raise _DiedError
            return usual(*args, **kwargs)

        return act

    for owner, name in ((Path, "open"), (Path, "replace"), (Path, "unlink"), (os, "fsync")):
        monkeypatch.setattr(owner, name, mortal(name, getattr(owner, name)))
    return begun


def after_a_death_at_each_point(
    directory: Path, prepare: Callable[[Overlay], Any], act: Callable[[Overlay], Any]
) -> set[tuple[str, str]]:
    """Return what a node starts with, and what it has when a trial is put back, of all deaths."""
    found = set()
    for number in range(100):
        data = directory / str(number)
        data.mkdir()
        prepare(Overlay(data))
        with pytest.MonkeyPatch.context() as patch:
            begun = die_at(patch, number)
            try:
                act(Overlay(data))
            except _DiedError:
                pass
            else:
                assert len(begun) == number > 0
                return found
        at_start = Overlay(data).read(is_start=True)
        Overlay(data).put_back()
        found.add((at_start, Overlay(data).read()))
    raise AssertionError("it does not end")


def test_nothing_is_there_at_first(tmp_path: Path) -> None:
    files = Overlay(tmp_path)
    assert (files.read(), files.read(is_start=True), files.put_back()) == ("", "", False)
    files.settle()
    assert list(tmp_path.iterdir()) == []


def test_what_is_on_trial_is_in_use_and_a_node_that_starts_has_what_was_before(tmp_path: Path) -> None:
    files = Overlay(tmp_path)
    files.put("a = 1")
    files.put_on_trial("a = 2")
    assert (files.read(), files.read(is_start=True)) == ("a = 2", "a = 1")
    assert files.put_back() is True
    assert (files.read(), files.read(is_start=True), files.put_back()) == ("a = 1", "a = 1", False)


def test_what_has_passed_stays(tmp_path: Path) -> None:
    files = Overlay(tmp_path)
    files.put_on_trial("a = 2")
    files.settle()
    assert (files.read(), files.read(is_start=True), files.put_back()) == ("a = 2", "a = 2", False)


def test_second_trial_goes_back_to_before_the_first(tmp_path: Path) -> None:
    files = Overlay(tmp_path)
    files.put("a = 1")
    files.put_on_trial("a = 2")
    files.put_on_trial("a = 3")
    assert files.put_back()
    assert files.read() == "a = 1"


def test_death_while_a_trial_begins_leaves_what_was_before(tmp_path: Path) -> None:
    found = after_a_death_at_each_point(
        tmp_path, lambda files: files.put("a = 1"), lambda files: files.put_on_trial("a = 2")
    )
    assert found == {("a = 1", "a = 1")}


def test_death_while_the_first_trial_of_all_begins_leaves_nothing(tmp_path: Path) -> None:
    found = after_a_death_at_each_point(tmp_path, lambda _: None, lambda files: files.put_on_trial("a = 2"))
    assert found == {("", "")}


@pytest.mark.parametrize("name", ["settle", "put_back"])
def test_death_while_a_trial_ends_leaves_it_on_trial(tmp_path: Path, name: str) -> None:
    def prepare(files: Overlay) -> None:
        files.put("a = 1")
        files.put_on_trial("a = 2")

    found = after_a_death_at_each_point(tmp_path, prepare, lambda files: getattr(files, name)())
    assert found == {("a = 1", "a = 1")}


def test_death_while_all_go_back_leaves_one_or_the_other_and_never_what_was_on_trial(tmp_path: Path) -> None:
    def prepare(files: Overlay) -> None:
        files.put("a = 1")
        files.put_on_trial("a = 2")

    found = after_a_death_at_each_point(tmp_path, prepare, lambda files: files.put("a = 0"))
    assert found == {("a = 1", "a = 1")}


def test_file_that_is_no_text_is_left_out(tmp_path: Path) -> None:
    (tmp_path / overlay._CURRENT).write_bytes(b"\xff\xfe")
    assert Overlay(tmp_path).read() == ""


# As a configuration


def load(data: Path, text: str = "", environ: Mapping[str, str] | None = None, **settings: Any) -> Config:
    file = data / "isthmus.toml"
    file.write_text(f'node = "n1"\ndata = "{data}"\n{text}', "utf-8")
    is_start = settings.pop("is_start", False)
    flags = {name.replace("__", "."): value for name, value in settings.items()}
    return load_config(file, flags, environ or {}, is_start=is_start)


def test_rolled_out_settings_are_in_use_unless_the_node_says_otherwise(tmp_path: Path) -> None:
    Overlay(tmp_path).put('[proxy]\nqueue_max = 7\ndrain_ms = 7\n[log]\nlevel = "error"')
    assert load(tmp_path).proxy.queue_max == 7
    assert load(tmp_path).log.level == "error"
    config = load(tmp_path, "[proxy]\nqueue_max = 8")
    assert (config.proxy.queue_max, config.proxy.drain_ms) == (8, 7)
    assert load(tmp_path, environ={"ISTHMUS_PROXY__QUEUE_MAX": "9"}).proxy.queue_max == 9
    assert load(tmp_path, log__level="debug").log.level == "debug"


def test_start_leaves_out_what_is_on_trial_and_a_reload_does_not(tmp_path: Path) -> None:
    files = Overlay(tmp_path)
    files.put("[proxy]\nqueue_max = 7")
    files.put_on_trial("[proxy]\nqueue_max = 8")
    assert load(tmp_path).proxy.queue_max == 8
    assert load(tmp_path, is_start=True).proxy.queue_max == 7


def test_setting_that_this_version_does_not_know_is_no_obstacle(tmp_path: Path) -> None:
    Overlay(tmp_path).put("[proxy]\nformer_setting = 7\nqueue_max = 7\n[former_section]\nx = 1")
    assert load(tmp_path).proxy.queue_max == 7
    assert load(tmp_path, is_start=True).proxy.queue_max == 7


@pytest.mark.parametrize("text", ["[proxy]\nqueue_max = -1", "[proxy]\nqueue_max = 'x'", "no TOML"])
def test_node_starts_without_settings_that_make_no_sense_and_a_reload_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    Overlay(tmp_path).put(text)
    with pytest.raises(ConfigError, match="rolled out"):
        load(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, is_start=True).proxy.queue_max == ProxyConfig().queue_max
    (record,) = caplog.records
    assert "left out" in record.message
    assert "rolled out" in record.problem  # type: ignore[attr-defined]  # an extra of the record


def test_error_names_where_the_setting_is_from(tmp_path: Path) -> None:
    Overlay(tmp_path).put("[proxy]\nqueue_max = -1")
    with pytest.raises(ConfigError, match=r"^rolled out to all nodes: proxy\.queue_max: expected "):
        load(tmp_path)
    Overlay(tmp_path).put("[proxy]\nqueue_max = 7")
    with pytest.raises(ConfigError, match=r"isthmus.toml:4: proxy\.queue_max"):
        load(tmp_path, "[proxy]\nqueue_max = -1", is_start=True)


def test_rolled_out_section_is_no_way_into_what_the_node_has_otherwise(tmp_path: Path) -> None:
    Overlay(tmp_path).put("proxy = 5\n[data]\nx = 1")
    with pytest.raises(ConfigError):
        load(tmp_path, "proxy = 6")
    assert load(tmp_path).proxy == ProxyConfig()


# Which can be rolled out


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[proxy]\nqueue_max = 7\nmachine_networks = ['10.0.0.0/8']",
        "[log]\nlevel = 'debug'",
        "[access_log]\nfile = '/tmp/x'",
        "[tracing]\nendpoint = 'http://127.0.0.1:4318'",
    ],
)
def test_live_settings_of_no_one_node_can_be_rolled_out(text: str) -> None:
    check_settings(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[proxy]\nlisten = '127.0.0.1:1'", "`proxy.listen` cannot be rolled out: it takes a restart"),
        ("[tls]\nlisten = '127.0.0.1:1'\ncertificates = ['/c']", "`tls.listen` cannot be rolled out"),
        ("node = 'n2'", "`node` cannot be rolled out: it takes a restart, and is said on each node"),
        ("data = '/x'", "`data` cannot"),
        ("workers = 2", "`workers` cannot"),
        ("[gossip]\nkeys = ['eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHg=']", "no place for keys"),
        ("[gossip]\nkeys_file = '/k'", "see `isthmus key`"),
        ("[tracing]\nheaders = {a = 'b'}", "no place for secrets"),
        ("[gossip]\njoin = ['127.0.0.1:1']", "`gossip.join` cannot"),
        ("[[apps]]\nname = 'web'\nhosts = ['a.test']", "`apps` cannot be rolled out: apps are in the table"),
        ("[regions.here]\nlatitude = 1.0\nlongitude = 1.0", "`regions` cannot be rolled out"),
        ("[admin]\ntoken = 'secret'", "`admin.token` cannot"),
        ("[proxy]\nqueue_maxx = 7", "settings:2: unknown key `proxy.queue_maxx`, did you mean"),
        ("[proxy]\nqueue_max = -7", "settings:2: proxy.queue_max: expected"),
        ("[prox]\nqueue_max = 7", "unknown key `prox`"),
        ("proxy = 7", "proxy: expected"),
        ("queue_max =", "settings: "),
    ],
)
def test_others_are_refused_with_the_reason(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_settings(text)
    assert problem in str(caught.value)


def test_settings_that_a_node_has_otherwise_are_listed() -> None:
    text = "[proxy]\nqueue_max = 7\ndrain_ms = 30000\n[log]\nlevel = 'debug'"
    config = Config(
        node="n1", data="/", proxy=ProxyConfig(queue_max=8, drain_ms=30_000), log=LogConfig(level="debug")
    )
    assert list_own(text, config) == ["proxy.queue_max"]
    assert list_own("", config) == []
