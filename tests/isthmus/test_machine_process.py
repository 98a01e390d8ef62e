"""Machines that are processes: real ones, of the shell."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from isthmus.config_machines import MachineConfig
from isthmus.machines.driver import DriverError, Machine
from isthmus.machines.output import LINE_BYTES_MAX, LINES_PER_S_MAX, Lines
from isthmus.machines.process import ProcessDriver
from tests.isthmus.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

MACHINE = Machine("m1", "web", "ams", "127.0.0.1", 4321)
NAPS = "sleep 60 & wait"  # a shell that waits hears signals at once


@asynccontextmanager
async def driving(where: Path, script: str, **settings: Any) -> AsyncIterator[ProcessDriver]:
    """A driver with one machine, which runs the script; all is ended afterwards."""
    config = MachineConfig(address="127.0.0.1:4321", id="m1", command=("/bin/sh", "-c", script), **settings)
    driver = ProcessDriver(where / "machines", {"m1": config})
    driver.adopt()
    try:
        yield driver
    finally:
        driver.configs = {"m1": MachineConfig(address="a:1", command=("x",), kill_timeout_ms=0)}
        await driver.stop(MACHINE)
        driver.close()


def pid_of(driver: ProcessDriver) -> int:
    return driver._running["m1"].record.pid


def is_there(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.line for record in caplog.records if record.msg == "a machine says"]


async def test_command_runs_with_its_variables_and_what_it_says_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("ISTHMUS_TOKEN", "secret")
    script = 'echo $PORT $FLY_MACHINE_ID $COLOUR "$ISTHMUS_TOKEN." $PWD; echo oh >&2; exec sleep 60'
    async with driving(tmp_path, script, env={"COLOUR": "blue"}, directory=str(tmp_path)) as driver:
        await driver.start(MACHINE)
        await eventually("its output", lambda: len(said(caplog)) == 2)
        assert said(caplog) == [f"4321 m1 blue . {tmp_path}", "oh"]
        assert await driver.is_running(MACHINE)
        pid = pid_of(driver)
        await driver.start(MACHINE)  # once more changes nothing
        assert pid_of(driver) == pid
    assert not is_there(pid)


async def test_command_has_the_release_where_it_wants_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with driving(tmp_path, "echo {release} $RELEASE; exec sleep 60") as driver:
        for machine, problem in (
            (MACHINE, "wants a release"),
            (MACHINE._replace(release="../v2"), "it has a /"),
        ):
            with pytest.raises(DriverError, match=problem):
                await driver.start(machine)
        await driver.start(MACHINE._replace(release="v2"))
        await eventually("its output", lambda: said(caplog) == ["v2 v2"])


async def test_stop_reaches_all_that_it_has_started(tmp_path: Path) -> None:
    child_script = f"trap 'echo bye > {tmp_path}/bye; exit' TERM; echo $$ > {tmp_path}/child; {NAPS}"
    async with driving(tmp_path, f'sh -c "{child_script}" & wait; sleep 0.2') as driver:
        await driver.start(MACHINE)
        child = int(await eventually("a child", lambda: _read(tmp_path / "child")))
        await driver.stop(MACHINE)
        assert await driver.is_running(MACHINE) is False
        assert _read(tmp_path / "bye") == "bye"
        await eventually("the child's end", lambda: not is_there(child) or _is_zombie(child))


async def test_one_that_does_not_listen_is_killed_after_its_time(tmp_path: Path) -> None:
    script = f"trap '' TERM; echo ready > {tmp_path}/ready; while true; do sleep 0.05; done"
    async with driving(tmp_path, script, kill_timeout_ms=50) as driver:
        await driver.start(MACHINE)
        await eventually("its start", lambda: _read(tmp_path / "ready"))
        pid = pid_of(driver)
        await driver.stop(MACHINE)
        assert not is_there(pid)


async def test_suspended_one_sleeps_and_goes_on_where_it_was(tmp_path: Path) -> None:
    script = f"trap 'echo bye > {tmp_path}/bye; exit' TERM; echo ready > {tmp_path}/ready; {NAPS}"
    async with driving(tmp_path, script) as driver:
        await driver.start(MACHINE)
        await eventually("its start", lambda: _read(tmp_path / "ready"))
        pid = pid_of(driver)
        assert await driver.suspend(MACHINE)
        await eventually("it sleeps", lambda: _state(pid) == "T")
        assert await driver.is_running(MACHINE) is False
        await driver.start(MACHINE)
        await eventually("it goes on", lambda: _state(pid) in {"S", "R"})
        assert (await driver.is_running(MACHINE), pid_of(driver)) == (True, pid)
        assert await driver.suspend(MACHINE)
        await driver.stop(MACHINE)
        assert not is_there(pid)
        assert _read(tmp_path / "bye") == "bye"


@pytest.mark.parametrize(
    ("script", "restart", "why", "again"),
    [
        ("exit 3", "on-failure", "exited with 3", True),
        ("exit 0", "on-failure", "exited with 0", False),
        ("exit 0", "always", "exited with 0", True),
        ("exit 3", "never", "exited with 3", False),
        ("kill -9 $$", "on-failure", "ended by SIGKILL", True),
    ],
)
async def test_end_is_explained_and_judged_by_the_restart_policy(
    tmp_path: Path, script: str, restart: str, why: str, again: bool
) -> None:
    async with driving(tmp_path, script, restart=restart) as driver:
        await driver.start(MACHINE)
        await eventually("its end", lambda: _not(driver))
        assert driver.explain_end(MACHINE) == (why, again)
        assert list((tmp_path / "machines").iterdir()) == []


async def test_program_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    driver = ProcessDriver(tmp_path / "m", {"m1": MachineConfig(address="a:1", command=("/nowhere/x",))})
    driver.adopt()
    with pytest.raises(DriverError, match="`/nowhere/x` cannot be run"):
        await driver.start(MACHINE)
    with pytest.raises(DriverError, match="no command for it"):
        await driver.start(MACHINE._replace(id="m2"))
    assert await driver.is_running(MACHINE) is False


async def test_next_agent_goes_on_with_what_runs_and_hears_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with driving(
        tmp_path, f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; echo went on; exec sleep 60"
    ) as first:
        await first.start(MACHINE)
        pid = pid_of(first)
        first.close()
        second = ProcessDriver(tmp_path / "machines", first.configs)
        second.adopt()
        assert (second.machines(), pid_of(second)) == ({"m1"}, pid)
        assert await second.is_running(MACHINE)
        (tmp_path / "go").touch()
        await eventually("its output", lambda: said(caplog) == ["went on"])
        ending = asyncio.create_task(second.stop(MACHINE))
        await eventually("its end", lambda: _state(pid) in {"Z", ""})
        assert await first.is_running(MACHINE) is False  # whose child it is, and who reaps it
        await ending
        second.close()


@pytest.mark.parametrize("ends_by_itself", [False, True])
async def test_next_agent_leaves_nothing_behind_of_what_has_ended(
    tmp_path: Path, *, ends_by_itself: bool
) -> None:
    deaf = f"(trap '' TERM; echo ready > {tmp_path}/ready; exec sleep 60) &"
    end = f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done" if ends_by_itself else "wait"
    async with driving(tmp_path, f"{deaf} {end}", kill_timeout_ms=50) as first:
        await first.start(MACHINE)
        await eventually("its start", lambda: _read(tmp_path / "ready"))
        first.close()
        second = ProcessDriver(tmp_path / "machines", first.configs)
        second.adopt()
        left = second._running["m1"]
        if ends_by_itself:
            (tmp_path / "go").touch()
            await eventually("its end", lambda: not left.is_alive())
            assert await second.is_running(MACHINE) is False
        else:
            await second.stop(MACHINE)
        await eventually("the end of what it has started", left.is_gone)
        second.close()


async def test_process_that_has_got_the_number_of_an_old_one_is_left_alone(tmp_path: Path) -> None:
    directory = tmp_path / "machines"
    directory.mkdir()
    for name, text in (
        ("m1", f'{{"pid":{os.getpid()},"started":1}}'),
        ("m2", "{"),
        ("m3", '{"pid":4194303,"started":1}'),
    ):
        (directory / f"{name}.json").write_text(text)
    driver = ProcessDriver(directory, {})
    driver.adopt()
    assert driver.machines() == set()
    assert list(directory.iterdir()) == []


def test_lines_are_bounded_in_length_and_number() -> None:
    lines = Lines()
    assert lines.feed(b"one\r\ntw", 0.0) == ["one"]
    assert lines.feed(b"o\n\n\xff\n", 0.1) == ["two", "\ufffd"]
    told = lines.feed(b"x" * 5_000, 0.2) + lines.feed(b"y" * 5_000 + b"\nz\n", 0.3)
    assert told == ["x" * LINE_BYTES_MAX + " …", "z"]
    flood = lines.feed(b"a\n" * 1_000, 1.0)
    assert len(flood) == LINES_PER_S_MAX
    assert lines.feed(b"b\n", 2.0) == [
        f"({1_000 - LINES_PER_S_MAX} lines were too much for a second and are left out)",
        "b",
    ]


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text().strip()
    return ""


def _state(pid: int) -> str:
    with suppress(OSError), open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123 — of the kernel
        return stat.read().rpartition(") ")[2][0]
    return ""


def _is_zombie(pid: int) -> bool:
    return _state(pid) in {"Z", ""}


async def _not(driver: ProcessDriver) -> bool:
    return not await driver.is_running(MACHINE)
