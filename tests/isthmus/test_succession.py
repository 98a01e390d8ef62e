"""What one program hands over to the next in the same process."""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from isthmus.children import Kept
from isthmus.commands.run import _rehearse
from isthmus.config import Config, ConfigError, ProxyConfig
from isthmus.notify import notify
from isthmus.processes import Process
from isthmus.reloading import Lifecycle
from isthmus.succession import (
    SIGNALS,
    VARIABLE,
    Handover,
    dump_config,
    find_command,
    hand_over,
    read_or_revive,
    rehearse,
    revive_configs,
    take_over,
)

if TYPE_CHECKING:
    from pathlib import Path

USED = Config(node="n1", data="/nowhere", proxy=ProxyConfig(listen="127.0.0.1:1234", head_timeout_ms=7))
FRESH = Config(node="n1", data="/nowhere", proxy=ProxyConfig(listen="127.0.0.1:0"))


def handover(lock: int = 0, **changes: Any) -> Handover:
    given = Handover(
        used=dump_config(USED),
        told=dump_config(FRESH),
        lock=lock,
        listeners={"proxy.listen": [lock]},
        children=[Kept("agent", 0, 1, lock, {"admin": "127.0.0.1:1"})],
        lifecycle=Lifecycle(generation=3),
        counted={"worker-0/1": [["isthmus_requests_total", [["app", "a"]], 1.0]]},
    )
    return msgspec.structs.replace(given, **changes)


def test_what_is_handed_over_is_taken_over_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[list[str], bool]] = []
    environ: dict[str, str] = {}

    def execve(program: str, command: list[str], given: dict[str, str]) -> None:
        """Look around as the next program would."""
        ran.append((command, os.get_inheritable(lock.fileno())))
        assert set(SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
        environ.update(given)
        environ[VARIABLE] = str(os.dup(int(given[VARIABLE])))
        raise OSError(2, "as if there were none")

    monkeypatch.setattr(os, "execve", execve)
    with socket.socket() as lock:
        given = handover(lock.fileno())
        with pytest.raises(OSError, match="as if there were none"):
            hand_over(["/program", "run"], given)
        assert ran == [(["/program", "run"], True)]
        # And this one goes on as if nothing had been.
        assert not os.get_inheritable(lock.fileno())
        assert not set(SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, ())
        taken = take_over(environ)
        assert msgspec.json.encode(taken) == msgspec.json.encode(given)
        assert take_over(environ) is None


def test_configurations_of_another_version_give_way_to_the_fresh_one() -> None:
    assert revive_configs(handover(), FRESH) == (USED, FRESH)
    old = dump_config(USED)
    old["proxy"]["no_more"] = 1
    used, told = revive_configs(handover(used=old), FRESH)
    # But for where the sockets are that were handed over.
    assert used == told == Config(node="n1", data="/nowhere", proxy=ProxyConfig(listen="127.0.0.1:1234"))


def test_a_configuration_that_became_wrong_does_not_end_a_running_node() -> None:
    def read() -> Config:
        raise ConfigError("line 3")

    with pytest.raises(ConfigError, match="line 3"):
        read_or_revive(read, None)
    assert read_or_revive(read, handover()) == FRESH


def test_what_is_run_is_what_was_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "isthmus"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script), "run", "--workers", "2"])
    assert find_command() == [str(script), "run", "--workers", "2"]
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "cli.py"), "run"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "isthmus.cli", "run"])
    assert find_command() == [sys.executable, "-X", "dev", "-m", "isthmus.cli", "run"]


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (["/bin/sh", "-c", "exit 0"], ""),
        (["/bin/sh", "-c", "echo more; echo isthmus: line 3 >&2; exit 1"], "does not start: line 3"),
        (["/bin/sh", "-c", "kill -9 $$"], "it exits with -9"),
        (["/nowhere/isthmus"], "cannot run /nowhere/isthmus: No such file or directory"),
    ],
)
async def test_a_trial_tells_what_is_wrong(command: list[str], problem: str) -> None:
    said = await rehearse(command)
    assert problem in said
    assert bool(said) == bool(problem)


def test_trial_of_a_good_configuration_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _rehearse(Config(node="n1", data=str(tmp_path))) == 0
    assert capsys.readouterr().out == "the configuration of node n1 is good; nothing was started\n"


def sleeping() -> int:
    return os.posix_spawn("/bin/sleep", ["sleep", "60"], {})


async def test_a_process_of_an_earlier_program_is_waited_for() -> None:
    started = Process.start(["/bin/sh", "-c", "exit 3"], ())
    assert await started.wait() == 3
    kept = Process(sleeping())
    assert kept.returncode is None
    kept.send_signal(signal.SIGTERM)
    assert await kept.wait() == -signal.SIGTERM
    kept.send_signal(signal.SIGTERM)  # to nobody, and to no other process that has its id by now


def test_the_service_manager_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("READY=1")
        assert manager.recv(100) == b"READY=1"
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify("READY=1")
