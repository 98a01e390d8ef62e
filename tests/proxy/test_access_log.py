"""The access log: what its lines say, that nobody can forge one, and that traffic never waits for it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.access_log import STDOUT, AccessLog
from proxy.core.access_line import Entry, render_combined, render_json
from proxy.metrics import ProxyMetrics
from tests.proxy.edge import Edge, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.fakes.machine import Connection

ENTRY = Entry(
    started_us=1_795_444_385_123_456,
    request_id=b"01X-ams",
    client=b"192.0.2.1",
    method=b"GET",
    host=b"app.test",
    target=b"/a?b=c",
    minor=1,
    lines=[b"User-Agent: curl/8", b"Referer: https://x.test/"],
    status=200,
    bytes_in=3,
    bytes_out=4_096,
    duration_s=0.25,
    first_byte_s=0.125,
    app="app",
    machine="m1",
    region="ams",
    retries=1,
    replays=2,
    error="",
)


def test_a_json_line_has_every_field() -> None:
    assert json.loads(render_json(ENTRY)) == {
        "time": "2026-11-23T14:33:05.123Z",
        "request_id": "01X-ams",
        "client": "192.0.2.1",
        "method": "GET",
        "host": "app.test",
        "path": "/a?b=c",
        "status": 200,
        "bytes_in": 3,
        "bytes_out": 4096,
        "duration_ms": 250,
        "first_byte_ms": 125,
        "app": "app",
        "machine": "m1",
        "region": "ams",
        "retries": 1,
        "replays": 2,
        "error": "",
    }


def test_a_combined_line_is_what_log_tools_read() -> None:
    assert render_combined(ENTRY) == (
        b'192.0.2.1 - - [23/Nov/2026:14:33:05 +0000] "GET /a?b=c HTTP/1.1" 200 4096 '
        b'"https://x.test/" "curl/8"\n'
    )
    bare = ENTRY._replace(method=b"", target=b"", lines=[], client=b"")
    assert render_combined(bare).endswith(b'] "-" 200 4096 "-" "-"\n')


HOSTILE = st.binary(max_size=60) | st.sampled_from(
    [b'"', b"\\", b"\r\n", b'","status":200,"x":"', b"\xe2\x80\xa8"]
)


@given(HOSTILE, HOSTILE, HOSTILE)
def test_no_bytes_of_a_client_make_another_line_or_field(host: bytes, target: bytes, agent: bytes) -> None:
    entry = ENTRY._replace(host=host, target=target, lines=[b"user-agent: " + agent])
    for line in (render_json(entry), render_combined(entry)):
        assert line.count(b"\n") == 1
        assert re.fullmatch(rb"[ -~]*\n", line)
    said = json.loads(render_json(entry))
    assert said.keys() == json.loads(render_json(ENTRY)).keys()
    assert said["host"] == host.decode("utf-8", "backslashreplace")
    assert re.fullmatch(rb'[^"]*"[^"]*" 200 4096 "[^"]*" "[^"]*"\n', render_combined(entry))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., AccessLog]]:
    logs: list[AccessLog] = []

    def open_log(
        style: str = "json", one_in: int = 1, file: str = "", metrics: ProxyMetrics | None = None
    ) -> AccessLog:
        log = AccessLog(file or str(tmp_path / "access.log"), style, one_in, metrics or ProxyMetrics())
        logs.append(log)
        return log

    yield open_log
    for log in logs:
        log.close()


async def read_lines(path: Path, count: int) -> list[dict[str, Any]]:
    """The lines, once there are so many."""
    lines: list[bytes] = []

    def are_here() -> bool:
        lines[:] = path.read_bytes().splitlines()
        return len(lines) >= count

    await wait_for(are_here)
    return [json.loads(line) for line in lines]


async def test_a_request_is_logged_with_what_became_of_it(
    edge: Edge, opened: Callable[..., AccessLog], tmp_path: Path
) -> None:
    edge.access_log = opened()
    dead = await edge.machine("m1")
    await dead.stop()
    await edge.machine("m2", region="gru")
    await edge.start()
    client = await edge.client()
    client.send(b'POST /x"y HTTP/1.1\r\nHost: app.test\r\nContent-Length: 5\r\n\r\nhello')
    response = await client.read_response()
    (line,) = await read_lines(tmp_path / "access.log", 1)
    assert line["request_id"].encode() == response.values(b"fly-request-id")[0]
    assert line["duration_ms"] >= line["first_byte_ms"] >= 0
    told = {
        key: line[key] for key in line if key not in {"time", "request_id", "duration_ms", "first_byte_ms"}
    }
    assert told == {
        "client": "127.0.0.1",
        "method": "POST",
        "host": "app.test",
        "path": '/x"y',
        "status": 200,
        "bytes_in": 5,
        "bytes_out": 2,
        "app": "app",
        "machine": "m2",
        "region": "gru",
        "retries": 1,
        "replays": 0,
        "error": "",
    }


async def test_each_way_to_fail_is_one_line(
    edge: Edge, opened: Callable[..., AccessLog], tmp_path: Path
) -> None:
    edge.access_log = opened()
    edge.put_app("none", "none.test")
    await edge.machine(behave=lambda c: asyncio.sleep(60))
    await edge.start(body_timeout_s=0.05, trusted_proxies=("127.0.0.0/8",))
    await edge.exchange(b"GET / HTTP/1.1\r\nHost: none.test\r\nX-Forwarded-For: 192.0.2.9\r\n\r\n")
    await edge.exchange(b"GET / HTTP/1.1\r\nHost: nowhere.test\r\n\r\n")
    await edge.exchange(b"GET / HTTP/1.1\nHost: app.test\n\n")
    await edge.exchange(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 9\r\n\r\nhello")
    gone = await edge.client()
    gone.send(b"GET /gone HTTP/1.1\r\nHost: app.test\r\n\r\n")
    await wait_for(lambda: edge.metrics.in_flight == 1)
    gone.close()
    lines = await read_lines(tmp_path / "access.log", 5)
    assert [(line["status"], line["error"], line["host"]) for line in lines] == [
        (503, "PR01", "none.test"),
        (404, "PH13", "nowhere.test"),
        (400, "PH01", ""),
        (408, "PH09", "app.test"),
        (499, "", "app.test"),
    ]
    assert [line["client"] for line in lines[:2]] == ["192.0.2.9", "127.0.0.1"]
    assert all(line["bytes_out"] > 50 for line in lines[:3])


async def test_an_answer_of_the_proxy_is_logged_with_the_bytes_of_its_body(
    edge: Edge, opened: Callable[..., AccessLog], tmp_path: Path
) -> None:
    edge.access_log = opened()
    edge.put_app("none", "none.test")
    edge.put_app("app", "app.test", options='{"force_https": true}')
    await edge.start()
    said = [
        await edge.exchange(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
        for host in (b"none.test", b"nowhere.test", b"app.test")
    ]
    lines = await read_lines(tmp_path / "access.log", 3)
    assert [(line["status"], line["bytes_out"]) for line in lines] == [
        (response.status, len(response.body)) for response in said
    ]
    assert [line["app"] for line in lines] == ["none", "", "app"]


async def test_a_replay_is_one_line_that_counts_it(
    edge: Edge, opened: Callable[..., AccessLog], tmp_path: Path
) -> None:
    edge.access_log = opened()
    await edge.machine(
        "m1", answer=lambda r: b"HTTP/1.1 200 OK\r\nfly-replay: instance=m2\r\nContent-Length: 3\r\n\r\nxyz"
    )
    await edge.machine("m2", region="gru")
    await edge.start()
    await edge.get()
    (line,) = await read_lines(tmp_path / "access.log", 1)
    assert (line["replays"], line["machine"], line["bytes_out"]) == (1, "m2", 2)


async def test_one_in_so_many_is_logged(edge: Edge, opened: Callable[..., AccessLog], tmp_path: Path) -> None:
    edge.access_log = opened(one_in=10)
    await edge.machine()
    await edge.start()
    client = await edge.client()
    for _ in range(35):
        await client.get()
    assert len(await read_lines(tmp_path / "access.log", 3)) == 3


def test_a_log_that_was_moved_away_goes_on_in_a_new_file(
    opened: Callable[..., AccessLog], tmp_path: Path
) -> None:
    path = tmp_path / "access.log"
    log = opened()
    log.add(ENTRY)
    log.handle_deadline()
    path.rename(tmp_path / "access.log.1")
    log.reopen()
    log.add(ENTRY._replace(status=404))
    log.close()
    assert b'"status":200' in (tmp_path / "access.log.1").read_bytes()
    assert path.read_bytes() == render_json(ENTRY._replace(status=404))


def test_a_log_that_cannot_be_reopened_goes_on_in_the_old_file(
    opened: Callable[..., AccessLog], tmp_path: Path
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    log = opened(file=str(folder / "access.log"))
    folder.rename(tmp_path / "moved")
    log.reopen()
    log.add(ENTRY)
    log.close()
    assert (tmp_path / "moved" / "access.log").read_bytes() == render_json(ENTRY)


def test_a_log_nobody_reads_is_dropped_and_counted_and_blocks_nobody(
    monkeypatch: pytest.MonkeyPatch, opened: Callable[..., AccessLog]
) -> None:
    reading, writing = os.pipe()
    monkeypatch.setattr(os, "dup", lambda _: writing)
    metrics = ProxyMetrics()
    log = opened(file=STDOUT, metrics=metrics)
    entry = ENTRY._replace(target=b"/" + b"x" * 60_000)
    while not metrics.log_lines_dropped:
        log.add(entry)
    # Reading it frees the thread.
    drain = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(reading, 1 << 20), b"")])
    drain.start()
    log.close()
    drain.join()
    os.close(reading)


def test_lines_on_a_pipe_are_written_in_pieces_that_are_not_mixed(
    monkeypatch: pytest.MonkeyPatch, opened: Callable[..., AccessLog]
) -> None:
    reading, writing = os.pipe()
    written: list[int] = []
    write = os.write
    monkeypatch.setattr(os, "dup", lambda _: writing)
    monkeypatch.setattr(os, "write", lambda fd, data: written.append(len(data)) or write(fd, data))
    log = opened(file=STDOUT)
    for _ in range(100):
        log.add(ENTRY)
    log.close()
    assert os.read(reading, 1 << 20) == render_json(ENTRY) * 100
    assert max(written) <= 4_096
    assert len(written) < 15
    os.close(reading)


async def test_an_upgraded_connection_is_logged_when_it_ends(
    edge: Edge, opened: Callable[..., AccessLog], tmp_path: Path
) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        connection.writer.write(b"hello")
        await connection.read_until(b"abc")
        await connection.read()

    edge.access_log = opened()
    await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert (await client.read_response()).status == 101
    client.send(b"abc")
    assert await client.read(5) == b"hello"
    client.writer.write_eof()
    (line,) = await read_lines(tmp_path / "access.log", 1)
    assert (line["status"], line["bytes_in"], line["bytes_out"]) == (101, 3, 5)


async def test_a_log_with_an_answer_in_pieces_counts_all_of_it(
    edge: Edge, opened: Callable[..., AccessLog], tmp_path: Path
) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await connection.writer.drain()
        await asyncio.sleep(0.01)
        connection.writer.write(b"4\r\ndefg\r\n0\r\n\r\n")

    edge.access_log = opened()
    await edge.machine(behave=behave)
    await edge.start()
    assert (await edge.get()).body == b"abcdefg"
    (line,) = await read_lines(tmp_path / "access.log", 1)
    assert line["bytes_out"] == 7
