"""A node goes on as a new program, and stops, under load: no request fails, no write is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shutil
import socket
import subprocess
import sys
import time
from base64 import b64encode
from typing import TYPE_CHECKING, Any, Self

import pytest

from tests.fakes.client import RawClient
from tests.fakes.machine import Connection, FakeMachine
from tests.integration import processes
from tests.integration.load import Load
from tests.integration.processes import ROOT, Node, clean_environment, request, wait_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


async def behave(connection: Connection) -> None:
    """Answer GET at once, echo POST, speak a protocol of its own after an upgrade, and stream for a while."""
    while True:
        asked = await connection.read_request()
        writer = connection.writer
        if asked.values(b"upgrade"):
            writer.write(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
            )
            while data := await connection.read():
                writer.write(data.upper())
        elif b"/stream" in asked.line:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(20):
                writer.write(b"4\r\ntick\r\n")
                await asyncio.sleep(0.05)
            writer.write(b"0\r\n\r\n")
        else:
            body = asked.body or b"ok"
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


@pytest.fixture
async def machine() -> AsyncIterator[FakeMachine]:
    machine = await FakeMachine(behave=behave).start()
    yield machine
    await machine.stop()


def config(machine: FakeMachine, workers: int = 2) -> str:
    return f"""
workers = {workers}
proxy.listen = "127.0.0.1:0"
admin.listen = "127.0.0.1:0"
gossip.listen = "127.0.0.1:0"
[[apps]]
name = "app"
hosts = ["app.test"]
[[apps.machines]]
address = "127.0.0.1:{machine.port}"
"""


@contextlib.asynccontextmanager
async def running(directory: Path, config: str, name: str = "n1") -> AsyncIterator[Node]:
    node = await asyncio.to_thread(Node, name, directory, config)
    try:
        yield node
    finally:
        assert await asyncio.to_thread(node.close) == 0


def port_of(node: Node) -> int:
    return int(node.proxy.rsplit(":", 1)[1])


async def isthmus(*args: str) -> subprocess.CompletedProcess[str]:
    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "isthmus.cli", *args],
            cwd=ROOT,
            env=clean_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=90,
        )

    return await asyncio.to_thread(run)


async def eventually(what: str, condition: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(wait_for, what, condition)


async def websocket(port: int) -> RawClient:
    client = await RawClient.connect(port)
    client.send(
        b"GET /ws HTTP/1.1\r\nHost: app.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    await client.reader.readuntil(b"\r\n\r\n")
    return client


class Writer:
    """Writes rows on the node until it is stopped; `written` has those that were acknowledged."""

    def __init__(self, node: Node) -> None:
        self.written: set[str] = set()
        self._node = node
        self._is_stopping = False
        self._task = asyncio.create_task(asyncio.to_thread(self._run))

    def _run(self) -> None:
        number = 0
        while not self._is_stopping:
            number += 1
            insert = {"sql": "INSERT INTO apps (name) VALUES (?)", "params": [f"row-{number}"]}
            body = json.dumps({"statements": [insert]}).encode()
            headers = {"Content-Type": "application/json"}
            try:
                answer = request(self._node.admin, "/v1/db/exec", "POST", body, headers)
            except OSError:
                time.sleep(0.01)  # between two agents; nobody has taken it
                continue
            if answer.status == 200:
                self.written.add(f"row-{number}")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        self._is_stopping = True
        await self._task


def rows(node: Node) -> set[str]:
    query = {"sql": "SELECT name FROM apps WHERE name LIKE 'row-%'"}
    return {row[0] for row in node.change("db/query", query)["rows"]}


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the program, which nodes of this test run."""
    copy = tmp_path / "program"
    for package in ("isthmus", "proxy", "replication", "routing"):
        shutil.copytree(
            ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__", "_compiled")
        )
    monkeypatch.setattr(processes, "ROOT", copy)
    return copy


def install(program: Path, version: str) -> None:
    (program / "isthmus" / "__init__.py").write_text(f'"""Isthmus."""\n\n__version__ = "{version}"\n')


async def test_upgrades_fail_no_request_and_lose_no_write(
    tmp_path: Path, machine: FakeMachine, program: Path
) -> None:
    async with (
        running(tmp_path, config(machine)) as node,
        Load(port_of(node)) as load,
        Writer(node) as writer,
    ):
        pid = node.process.pid
        load.start()
        await eventually("requests", lambda: load.answered > 200)
        tunnel, stream = await websocket(load.port), await RawClient.connect(load.port)
        with contextlib.closing(tunnel), contextlib.closing(stream):
            stream.send(b"GET /stream HTTP/1.1\r\nHost: app.test\r\n\r\n")
            for generation in (2, 3):
                before = set(node.worker_pids())
                install(program, f"0.0.{generation}")
                done = await isthmus("upgrade", "--data", str(node.data))
                assert done.returncode == 0, done.stderr + node.said()
                assert done.stdout == f"isthmus 0.0.{generation} serves on n1\n"
                served = load.answered
                await eventually("new workers", lambda b=before: len(set(node.worker_pids()) - b) == 2)
                tunnel.send(b"still here")
                assert await tunnel.reader.readexactly(10) == b"STILL HERE"
                await eventually("requests on", lambda s=served: load.answered > s + 100)
            assert (await stream.read_response()).body == b"tick" * 20
            assert node.show("status")["lifecycle"]["generation"] == 3
            assert json.loads((node.data / "node.json").read_text())["pid"] == pid == node.process.pid
            await writer.stop()
            await load.stop()
            assert not load.failures, load.failures[:5]
            assert load.closes_told > 0, "no kept connection was told to go, so nothing was shown"
            assert len(writer.written) > 20
            assert rows(node) >= writer.written
            least = load.answered + 1  # and the stream; the tunnel counts when it is over
            await eventually("all counted", lambda: node.metric("isthmus_requests_total") >= least)
        await eventually("only two workers are left", lambda: len(node.worker_pids()) == 2)
        assert "Traceback" not in node.said()


async def test_requests_through_a_node_that_is_upgraded_do_not_fail(
    tmp_path: Path, machine: FakeMachine, program: Path
) -> None:
    key = b64encode(secrets.token_bytes(32)).decode()
    shared = f'gossip.keys = ["{key}"]\n'
    async with running(
        tmp_path, f'region = "syd"\n{shared}peering.listen = "127.0.0.1:0"\n{config(machine)}'
    ) as far:
        near = f"""
region = "ams"
workers = 2
proxy.listen = "127.0.0.1:0"
proxy.machine_networks = ["192.0.2.0/24"]
admin.listen = "127.0.0.1:0"
gossip.listen = "127.0.0.1:0"
gossip.join = ["{far.info["gossip"]}"]
{shared}"""
        async with running(tmp_path, near, "n2") as edge, Load(port_of(edge)) as load:
            await eventually("the machine to be known", edge.routable)
            load.start(kept=12, posting=6)
            await eventually("requests", lambda: load.answered > 200)
            for generation in (2, 3):
                install(program, f"0.0.{generation}")
                done = await isthmus("upgrade", "--data", str(far.data))
                assert done.returncode == 0, done.stderr + far.said()
                served = load.answered
                await eventually("requests on", lambda s=served: load.answered > s + 300)
            await load.stop()
            assert not load.failures, load.failures[:5]
            await eventually("only two workers are left", lambda: len(far.worker_pids()) == 2)


async def test_a_program_or_a_configuration_that_is_broken_changes_nothing(
    tmp_path: Path, machine: FakeMachine, program: Path
) -> None:
    async with running(tmp_path, config(machine, workers=1)) as node, Load(port_of(node)) as load:
        load.start()
        file, data = tmp_path / "n1.toml", str(node.data)
        good = file.read_text()
        before = node.show("status")["agent_pid"], node.worker_pids()
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            listen = f'proxy.listen = "127.0.0.1:{taken.getsockname()[1]}"'
            for content, problem in (
                (good.replace('proxy.listen = "127.0.0.1:0"', listen), "is taken"),
                (good.replace("workers = 1", "workers = 0"), "no workers"),
            ):
                file.write_text(content)
                done = await isthmus("upgrade", "--data", data)
                assert done.returncode == 1
                assert "all goes on as before" in done.stderr
                assert problem in done.stderr
                assert problem in node.show("status")["lifecycle"]["upgrade_problem"]
        file.write_text(good)
        # Unlike those, this is found before the program is replaced.
        (program / "isthmus" / "supervisor.py").write_text("def broken(:\n")
        done = await isthmus("upgrade", "--data", data)
        assert done.returncode == 1
        assert "SyntaxError" in done.stderr
        assert (node.show("status")["agent_pid"], node.worker_pids()) == before
        served = load.answered
        await eventually("requests on", lambda: load.answered > served + 50)
        await load.stop()
        assert not load.failures, load.failures[:5]


@pytest.mark.parametrize("workers", [0, 2])
async def test_a_node_that_stops_fails_no_request(tmp_path: Path, machine: FakeMachine, workers: int) -> None:
    async with running(tmp_path, config(machine, workers)) as node, Load(port_of(node)) as load:
        load.start(kept=16, fresh=8)
        await eventually("requests", lambda: load.answered > 200)
        load.is_closing = True
        assert await asyncio.to_thread(node.close) == 0
        await load.stop()
        assert not load.failures, load.failures[:5]
        assert load.closes_told > 0
