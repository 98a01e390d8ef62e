"""isthmus, nginx and HAProxy side by side: each with many listeners, and a recording machine behind each.

A listener and its machine are a lane. A lane carries one case at a time, so that whatever arrives at its
machine came of that case, however malformed it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

from tests.fakes.machine import Connection, FakeMachine, Request
from tests.integration.processes import free_port
from tests.proxy.edge import Edge

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

PATH = "/usr/sbin:/usr/local/sbin:/sbin:/usr/bin:/usr/local/bin:/bin"
PACKAGES = {"nginx": "nginx-light", "haproxy": "haproxy"}
LANES = 12
# What waits for bytes that never come is told apart from what works after this time.
PATIENCE_S = 0.7
PROBE = b"GET /probe HTTP/1.1\r\nHost: app.test\r\nConnection: close\r\n\r\n"
_START_S = 10.0
_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})\b")

# As both are usually set up in front of an application; the times are short to tell waiting from working.
NGINX = """
worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/log crit;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_header_timeout 2s; client_body_timeout 2s; keepalive_timeout 5s; proxy_read_timeout 3s;

  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;
  proxy_set_header X-Forwarded-For $remote_addr; proxy_set_header X-Forwarded-Proto $scheme;
  proxy_set_header X-Real-IP $remote_addr;
  {lanes}
}}
"""
NGINX_LANE = """
  upstream m{n} {{ server 127.0.0.1:{machine} max_fails=0; keepalive 8; }}
  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://m{n}; }} }}
"""
HAPROXY = """
global
  nbthread 1
defaults
  mode http
  timeout connect 1s
  timeout client 2s
  timeout http-request 2s
  timeout http-keep-alive 5s
  timeout server 3s
  option forwardfor
{lanes}
"""
HAPROXY_LANE = """
frontend f{n}
  bind 127.0.0.1:{port}
  http-request set-header X-Forwarded-Proto http
  default_backend b{n}
backend b{n}
  server m{n} 127.0.0.1:{machine}
"""


class Lane:
    """One listener of a proxy with its machine."""

    def __init__(self, machine: FakeMachine) -> None:
        self.machine = machine
        self.port = 0
        self.raw: bytes | None = None  # what the machine answers to all but the probe; None: 200
        self.answers = b""  # all that the client got of the last case

    async def serve(self, connection: Connection) -> None:
        """Answer as the case wants it, with a word that tells the probe's answer from all others."""
        while True:
            request = await connection.read_request()
            self.machine.requests.append(request)
            probe = b"/probe" in request.line
            if probe or self.raw is None:
                body = b"" if request.line.startswith(b"HEAD") else b"ok"
                name = b"probe" if probe else b"case"
                connection.writer.write(
                    b"HTTP/1.1 200 OK\r\nX-Answer: %b\r\nContent-Length: 2\r\n\r\n%b" % (name, body)
                )
                continue
            connection.writer.write(self.raw)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.25):
                    # Another request may come on it; a machine that is done closes.
                    self.machine.requests.append(await connection.read_request())
                    connection.writer.write(
                        b"HTTP/1.1 200 OK\r\nX-Answer: probe\r\nContent-Length: 0\r\n\r\n"
                    )
                    continue
            return

    async def ask(self, data: bytes) -> tuple[list[int], list[Request], str]:
        """Send bytes, then the probe; return statuses, what arrived, and what became of the connection."""
        self.machine.requests.clear()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        answers = b""
        try:
            async with asyncio.timeout(10):
                with contextlib.suppress(TimeoutError):
                    answers = await asyncio.wait_for(reader.read(65_536), PATIENCE_S)
                if not writer.transport.is_closing():
                    writer.write(PROBE)
                while b"x-answer: probe" not in answers.lower() and (piece := await reader.read(65_536)):
                    answers += piece
        except (ConnectionError, TimeoutError):
            pass
        finally:
            writer.transport.abort()
        probed = b"x-answer: probe" in answers.lower()
        statuses = [int(status) for status in _STATUS.findall(answers)]
        arrived = [r for r in self.machine.requests if b"/probe" not in r.line]
        self.answers = answers
        return statuses[:-1] if probed else statuses, arrived, "kept" if probed else "closed"


def find(program: str) -> str | None:
    return shutil.which(program, path=PATH)


def read_version(program: str) -> str:
    said = subprocess.run([find(program) or program, "-v"], capture_output=True, text=True, check=False)
    found = re.search(r"(\d+\.\d+)\.\d+", said.stdout + said.stderr)
    return found[1] if found else "?"


async def _make_lanes() -> list[Lane]:
    lanes = []
    for _ in range(LANES):
        lane = Lane(FakeMachine())
        lane.machine.behave = lane.serve
        await lane.machine.start()
        lanes.append(lane)
    return lanes


@contextlib.asynccontextmanager
async def running(name: str, folder: Path) -> AsyncIterator[list[Lane]]:
    """Start a proxy; yields its lanes."""
    lanes = await _make_lanes()
    start = _run_isthmus if name == "isthmus" else _run_peer
    try:
        async with start(name, folder, lanes):
            yield lanes
    finally:
        for lane in lanes:
            await lane.machine.stop()


@contextlib.asynccontextmanager
async def _run_isthmus(name: str, folder: Path, lanes: list[Lane]) -> AsyncIterator[None]:
    edges = []
    for lane in lanes:
        edge = Edge()
        edge.put_app("app", "*")
        edge.put_machine("m1", lane.machine.port)
        await edge.start(head_timeout_s=2.0, body_timeout_s=2.0, linger_s=0.5)
        lane.port = edge.server.port
        edges.append(edge)
    try:
        yield
    finally:
        for edge in edges:
            await edge.stop()


@contextlib.asynccontextmanager
async def _run_peer(name: str, folder: Path, lanes: list[Lane]) -> AsyncIterator[None]:
    template, each = (NGINX, NGINX_LANE) if name == "nginx" else (HAPROXY, HAPROXY_LANE)
    for lane in lanes:
        lane.port = free_port()
    written = [each.format(n=n, port=lane.port, machine=lane.machine.port) for n, lane in enumerate(lanes)]
    config = folder / f"{name}.conf"
    config.write_text(template.format(folder=folder, lanes="".join(written)))
    arguments = (
        ["-c", str(config), "-e", str(folder / "log")]
        if name == "nginx"
        else ["-db", "-q", "-f", str(config)]
    )
    program = find(name)
    assert program is not None
    process = await asyncio.create_subprocess_exec(program, *arguments, stderr=asyncio.subprocess.PIPE)
    try:
        await _wait_until_open(lanes[-1].port)
        yield
    finally:
        process.terminate()
        await process.communicate()


async def _wait_until_open(port: int) -> None:
    async with asyncio.timeout(_START_S):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.transport.abort()
                return
            await asyncio.sleep(0.02)


async def ask_all(
    lanes: list[Lane], cases: list[Any], ask: Callable[[Lane, Any], Awaitable[Any]]
) -> list[Any]:
    """Carry all cases through the lanes; the results are in the order of the cases."""
    results: list[Any] = [None] * len(cases)
    waiting = list(enumerate(cases))[::-1]

    async def drive(lane: Lane) -> None:
        while waiting:
            number, case = waiting.pop()
            results[number] = await ask(lane, case)

    await asyncio.gather(*(drive(lane) for lane in lanes))
    return results
