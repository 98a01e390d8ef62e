"""A supervisor with the real child processes of a node."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from isthmus import supervisor as supervisor_module
from isthmus.child import Life, Order, Report, Task, obey
from isthmus.config import AdminConfig, Config, ConfigError, GossipConfig, ProxyConfig
from isthmus.reloading import Lifecycle
from isthmus.supervisor import NodeInfo, Supervisor, lock_data_dir, read_node_info, write_node_info
from tests.isthmus.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ROOT = Path(__file__).resolve().parents[2]
ANY = "127.0.0.1:0"


def config(data: Path, workers: int = 0, **columns: Any) -> Config:
    """A node on ports that the system chooses; with no workers its only child is the agent."""
    return Config(
        node="n1",
        data=str(data),
        workers=workers,
        proxy=ProxyConfig(listen=ANY, drain_ms=100),
        admin=AdminConfig(listen=ANY),
        gossip=GossipConfig(listen=ANY),
        **columns,
    )


class Node:
    """A running supervisor in this process, and what it announced."""

    def __init__(self, supervisor: Supervisor, info: NodeInfo) -> None:
        self.supervisor = supervisor
        self.info = info

    def child(self, name: str) -> Any:
        (child,) = (child for child in self.supervisor._children if child.name == name)
        return child

    async def next_life(self, name: str, pid: int) -> int:
        """Wait until another process than `pid` serves as the child, and return its id."""
        child = self.child(name)
        await eventually(
            f"{name} serves again",
            lambda: child.ready.is_set() and child.process and child.process.pid != pid,
        )
        return int(child.process.pid)


@asynccontextmanager
async def running(given: Config) -> AsyncIterator[Node]:
    announced: asyncio.Future[NodeInfo] = asyncio.get_running_loop().create_future()
    supervisor = Supervisor(given, announced.set_result)
    task = asyncio.create_task(supervisor.run())
    try:
        await asyncio.wait((task, announced), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        yield Node(supervisor, announced.result())
    finally:
        supervisor._stopping.set()
        await task


def is_running(pid: int) -> bool:
    """True while the process exists and has not ended; one that nobody has waited for yet has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def ask(address: str, path: str) -> Any:
    def fetch() -> Any:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as response:
            return json.loads(response.read())

    return await asyncio.to_thread(fetch)


async def test_killed_agent_is_started_again_where_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(config(tmp_path)) as node:
        agent = node.child("agent")
        first = agent.process.pid
        assert (await ask(node.info.admin, "/v1/status"))["agent_pid"] == first
        os.kill(first, signal.SIGKILL)
        second = await node.next_life("agent", first)
        status = await ask(node.info.admin, "/v1/status")
        assert status["agent_pid"] == second
        assert status["replication"]["address"] == ["127.0.0.1", int(node.info.gossip.rsplit(":", 1)[1])]
        assert agent.restarts == 1
    (record,) = (record for record in caplog.records if record.message == "a process died and is restarted")
    assert (record.child, record.exit) == ("agent", -signal.SIGKILL)


async def test_killed_worker_is_started_again_while_the_other_serves(tmp_path: Path) -> None:
    async with running(config(tmp_path, workers=2)) as node:
        first = node.child("worker-0").process.pid
        other = node.child("worker-1").process.pid
        os.kill(first, signal.SIGKILL)
        await node.next_life("worker-0", first)
        assert node.child("worker-1").process.pid == other
        assert node.child("agent").restarts == 0
        # Both accept: the kernel spreads connections over them.
        host, port = node.info.listen.split(":")
        for _ in range(8):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET / HTTP/1.1\r\nHost: none.test\r\nConnection: close\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 404 ")
            writer.close()
            await writer.wait_closed()


async def test_worker_that_goes_on_dying_leaves_new_connections_to_the_others(tmp_path: Path) -> None:
    async with running(config(tmp_path, workers=2)) as node:
        host, port = node.info.listen.split(":")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", "/bin/false")
            patch.setattr(supervisor_module, "RESTART_MAX_S", 60.0)
            patch.setattr(supervisor_module, "RESTART_MIN_S", 0.01)
            dying = node.child("worker-0")
            os.kill(dying.process.pid, signal.SIGKILL)
            await eventually("it dies again and again", lambda: dying.restarts >= 3)
            for _ in range(8):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(b"GET / HTTP/1.1\r\nHost: none.test\r\nConnection: close\r\n\r\n")
                async with asyncio.timeout(10):
                    assert (await reader.read()).startswith(b"HTTP/1.1 404 ")
                writer.close()
                await writer.wait_closed()


async def test_successors_that_do_not_come_up_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(config(tmp_path, workers=1)) as node:
        before = [child.process.pid for child in node.supervisor._children]
        monkeypatch.setattr(supervisor_module, "RESTART_MIN_S", 0.001)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "/bin/false")
            async with node.supervisor._changing:
                problem = await node.supervisor._try_candidates()
        assert problem == "agent dies when it starts; its log above says why"
        assert [child.process.pid for child in node.supervisor._children] == before
        assert not node.supervisor._candidates
        await eventually("nobody else is left", lambda: not node.supervisor._leaving)
        # And then a good one takes over from those that went on.
        await node.supervisor._succeed()
        lifecycle = (await ask(node.info.admin, "/v1/status"))["lifecycle"]
        assert (lifecycle["generation"], lifecycle["upgrade_problem"]) == (2, "")
        after = [child.process.pid for child in node.supervisor._children]
        assert not set(before) & set(after)


async def test_worker_of_successors_that_are_given_up_ends_what_it_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(config(tmp_path, workers=1)) as node:
        supervisor = node.supervisor
        waited: list[Any] = []

        async def refuse(child: Any, started: asyncio.Event) -> str:
            """Let the worker serve, and then find the agent wanting."""
            await eventually("it starts", started.is_set)
            waited.append(child)
            return "the agent is no good" if child.role == "agent" else ""

        async with supervisor._changing:
            with monkeypatch.context() as patch:
                patch.setattr(supervisor, "_await_start", refuse)
                patch.setattr(supervisor_module, "_wanted", lambda _: [("worker", 0), ("agent", 0)])
                assert await supervisor._try_candidates() == "the agent is no good"
        worker, agent = waited
        await eventually("they are gone", lambda: not supervisor._leaving)
        assert (worker.process, agent.process) == (None, None)
        assert (await ask(node.info.admin, "/v1/status"))["lifecycle"]["generation"] == 1


async def test_refusal_of_a_child_ends_the_node_with_its_sentence(tmp_path: Path) -> None:
    given = config(tmp_path)
    supervisor = Supervisor(given, lambda info: pytest.fail(f"announced {info}"))
    database = sqlite3.connect(given.database)
    database.execute("CREATE TABLE nodes (id INTEGER PRIMARY KEY, something TEXT)")
    database.close()
    with pytest.raises(ConfigError, match=r"the agent cannot start: .*table nodes"):
        await supervisor.run()
    assert supervisor._children[0].restarts == 0


async def test_child_that_dies_when_it_starts_ends_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(supervisor_module, "RESTART_MIN_S", 0.001)
    supervisor = Supervisor(config(tmp_path), lambda info: pytest.fail(f"announced {info}"))
    with pytest.raises(ConfigError, match="agent dies when it starts; its log above says why"):
        await supervisor.run()
    assert supervisor._children[0].restarts == supervisor_module.START_TRIES


@pytest.fixture
def sleeper(tmp_path: Path) -> Path:
    """A program that never serves."""
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o700)
    return sleeper


async def test_child_that_never_serves_ends_the_node(
    tmp_path: Path, sleeper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(sleeper))
    monkeypatch.setattr(supervisor_module, "START_S", 0.1)
    supervisor = Supervisor(config(tmp_path), lambda info: pytest.fail(f"announced {info}"))
    with pytest.raises(ConfigError, match="agent did not start within"):
        await supervisor.run()


@pytest.mark.parametrize("name", ["agent", "worker-0"])
async def test_stalled_loop_is_ended_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    monkeypatch.setattr(supervisor_module, "BEAT_S", 0.1)
    monkeypatch.setattr(supervisor_module, "STALL_S", 1.5)  # a child beats each second
    monkeypatch.setattr(supervisor_module, "DUMP_S", 0.01)
    async with running(config(tmp_path, workers=int(name != "agent"))) as node:
        first = node.child(name).process.pid
        os.kill(first, signal.SIGSTOP)
        await node.next_life(name, first)
        assert not is_running(first)
        assert (await ask(node.info.admin, "/healthz")) == {"ok": True}
    assert "an event loop is stalled; its stack follows" in caplog.messages


async def test_child_that_hangs_when_it_starts_again_is_ended_too(
    tmp_path: Path, sleeper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "BEAT_S", 0.05)
    monkeypatch.setattr(supervisor_module, "DUMP_S", 0.01)
    async with running(config(tmp_path)) as node:
        agent = node.child("agent")
        first = agent.process.pid
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(sleeper))
            os.kill(first, signal.SIGKILL)
            await eventually("it hangs", lambda: agent.process is not None and agent.process.pid != first)
            hanging = agent.process.pid
        with monkeypatch.context() as patch:
            patch.setattr(supervisor_module, "START_S", 0.1)
            await eventually("it is ended", lambda: not is_running(hanging))
        await node.next_life("agent", hanging)


@pytest.mark.usefixtures("capfd")  # which makes a file of what is written
async def test_child_writes_its_stack_when_asked_and_goes_on(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as node:
        pid = node.child("agent").process.pid
        os.kill(pid, signal.SIGUSR1)
        # Reading it by the fixture loses what is written meanwhile.
        await eventually("its stack", lambda: b"most recent call first" in os.pread(2, 1 << 20, 0))
        assert (await ask(node.info.admin, "/v1/status"))["agent_pid"] == pid


async def test_node_says_where_it_is_while_it_runs(tmp_path: Path) -> None:
    assert read_node_info(tmp_path) is None
    async with running(config(tmp_path)) as node:
        assert read_node_info(tmp_path) == node.info
        assert node.info.pid == os.getpid()
        assert "0" not in {
            address.rsplit(":", 1)[1] for address in (node.info.listen, node.info.admin, node.info.gossip)
        }
        agent = node.child("agent").process
    assert agent.returncode == 0
    assert read_node_info(tmp_path) is None


def test_who_reads_the_note_while_it_is_written_has_all_of_one(tmp_path: Path) -> None:
    file = tmp_path / "node.json"
    old, new = (NodeInfo("n1", "ams", pid, "a:1", "a:2", "a:3") for pid in (1, 2))
    write_node_info(file, old)
    with file.open("rb") as reading:
        write_node_info(file, new)
        assert msgspec.json.decode(reading.read(), type=NodeInfo) == old
    assert read_node_info(tmp_path) == new
    assert [path.name for path in tmp_path.iterdir()] == ["node.json"]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"node": 1}'])
def test_damaged_note_of_a_node_is_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "node.json").write_bytes(content)
    assert read_node_info(tmp_path) is None


class TestDataDirectory:
    async def test_second_node_on_a_data_directory_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(supervisor_module, "LOCK_WAIT_S", 0.0)
        lock = await lock_data_dir(config(tmp_path))
        with pytest.raises(
            ConfigError, match=r"is in use by another isthmus; stop that one, or .* --data DIR"
        ):
            await Supervisor(config(tmp_path), lambda info: None).run()
        os.close(lock)
        os.close(await lock_data_dir(config(tmp_path)))

    async def test_directory_that_is_about_to_be_free_is_waited_for(self, tmp_path: Path) -> None:
        lock = await lock_data_dir(config(tmp_path))
        second = asyncio.create_task(lock_data_dir(config(tmp_path)))
        asyncio.get_running_loop().call_later(0.05, os.close, lock)
        os.close(await second)

    async def test_note_of_a_node_that_was_killed_is_gone_with_its_lock(self, tmp_path: Path) -> None:
        (tmp_path / "node.json").write_text("what a killed node has left")
        os.close(await lock_data_dir(config(tmp_path)))
        assert not (tmp_path / "node.json").exists()

    async def test_directory_is_made_for_its_owner_alone(self, tmp_path: Path) -> None:
        data = tmp_path / "new" / "data"
        os.close(await lock_data_dir(config(data)))
        assert data.stat().st_mode & 0o077 == 0

    async def test_directory_that_cannot_be_had_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(
            ConfigError, match=r"data: cannot use .*/file/data: Not a directory; choose another"
        ):
            await lock_data_dir(config(tmp_path / "file" / "data"))

    async def test_path_too_long_for_a_socket_is_refused_and_let_go(self, tmp_path: Path) -> None:
        given = config(tmp_path / ("x" * 100))
        for _ in range(2):
            with pytest.raises(ConfigError, match="is too long for a Unix socket in it"):
                await lock_data_dir(given)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`isthmus run` as an operator starts it, in the state in which it has told that it serves."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("ISTHMUS_", "FLY_"))}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-m",
                    "isthmus.cli",
                    "run",
                    "--data",
                    str(tmp_path / "data"),
                    "--node",
                    "n1",
                ),
                *("--listen", ANY, "--admin-listen", ANY, "--gossip-listen", ANY),
            ],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert process.stdout is not None
        if not process.stdout.readline().startswith("isthmus "):
            pytest.fail((tmp_path / "log").read_text())
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def children_of(data: Path) -> list[int]:
    info = read_node_info(data)
    assert info is not None
    status = await eventually("a worker follows", lambda: follows(info.admin))
    return [status["agent_pid"], *(int(name.split("/")[1]) for name in status["workers_following"])]


async def follows(admin: str) -> Any:
    status = await ask(admin, "/v1/status")
    return status if status["workers_following"] else None


async def test_killed_supervisor_takes_its_children_down(
    command: subprocess.Popen[str], tmp_path: Path
) -> None:
    children = await children_of(tmp_path / "data")
    assert len(children) == 2
    command.kill()
    await eventually("children have ended", lambda: not any(map(is_running, children)))


async def test_child_stops_also_when_its_supervisor_died_with_beats_unread() -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)
    writer.write(b'{"beat": 1}\n')
    await writer.drain()
    ours.close()  # with something unread, the kernel resets the connection
    life = Life(Task("worker", 0, config(Path("/nowhere"))), "worker-0", lambda _: None)
    await obey(reader, life)
    await life.finish()
    assert isinstance(reader.exception(), ConnectionResetError)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_wish_for_a_reload_is_answered_by_that_reload_and_no_earlier_one() -> None:
    reports: list[Report] = []
    life = Life(Task("agent", 0, config(Path("/nowhere"))), "agent", reports.append)
    asked = asyncio.create_task(life.reload())
    await asyncio.sleep(0)
    assert reports[0].wish == "reload"
    wish_id = reports[0].wish_id
    for answers, problem in ((0, "of a signal"), (wish_id - 1, "of another wish"), (wish_id, "")):
        life.handle_order(Order(1, told=Lifecycle(reload_problem=problem), answers=answers))
        await asyncio.sleep(0)
    assert (await asked).reload_problem == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_node_stops_with_all_its_processes_when_it_is_told(
    command: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    children = await children_of(tmp_path / "data")
    command.send_signal(number)
    assert await asyncio.to_thread(command.wait, 20) == 0
    assert not any(map(is_running, children))
    assert read_node_info(tmp_path / "data") is None
    assert "Traceback" not in (tmp_path / "log").read_text()
