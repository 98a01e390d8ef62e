"""Large answers go from socket to socket inside the kernel, and nobody can tell."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from proxy import splicing
from tests.proxy.edge import Edge, wait_for

if TYPE_CHECKING:
    from tests.fakes.machine import Connection

pytestmark = pytest.mark.skipif(not splicing.IS_POSSIBLE, reason="this Python has no os.splice")

BODY = hashlib.shake_256(b"isthmus").digest(5_000_000)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"


def count_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes that were moved past this process."""
    sizes: list[int] = []
    splice = os.splice

    def watch(*args: int, **flags: int) -> int:
        sizes.append(splice(*args, **flags))
        return sizes[-1]

    monkeypatch.setattr(os, "splice", watch)
    return sizes


async def test_a_large_answer_arrives_whole_and_both_connections_go_on(edge: Edge, moved: list[int]) -> None:
    machine = await edge.machine(answer=lambda r: HEAD % len(BODY) + BODY)
    await edge.start()
    client = await edge.client()
    for _ in range(3):
        response = await client.get(b"/")
        assert hashlib.sha256(response.body).digest() == hashlib.sha256(BODY).digest()
    assert sum(moved) > len(BODY)  # each byte into a pipe and out of it, but a first part that was copied
    assert len(machine.connections) == 1
    assert edge.metrics.app("app").bytes_out == 3 * len(BODY)


async def test_requests_behind_a_large_answer_wait_for_its_end(edge: Edge, moved: list[int]) -> None:
    await edge.machine(
        answer=lambda r: HEAD % len(BODY) + BODY if b"/large" in r.line else HEAD % 5 + b"small"
    )
    await edge.start()
    client = await edge.client()
    for path in (b"/large", b"/small", b"/large", b"/small"):
        client.send(b"GET %b HTTP/1.1\r\nHost: app.test\r\n\r\n" % path)
    assert [len((await client.read_response()).body) for _ in range(4)] == [len(BODY), 5, len(BODY), 5]
    assert moved


async def test_what_comes_behind_it_is_nobodys_answer(edge: Edge, moved: list[int]) -> None:
    machine = await edge.machine(answer=lambda r: HEAD % len(BODY) + BODY + HEAD % 4 + b"evil")
    await edge.start()
    client = await edge.client()
    for _ in range(3):
        client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    assert [(await client.read_response()).body == BODY for _ in range(3)] == [True] * 3
    assert len(machine.connections) == 3
    assert moved


async def test_a_slow_client_gets_all_of_it_and_leaves_no_file_behind(edge: Edge, moved: list[int]) -> None:
    await edge.machine(answer=lambda r: HEAD % len(BODY) + BODY)
    await edge.start()
    await edge.get(b"/")
    moved.clear()
    before = count_files()
    client = await edge.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    # Until both the sockets and the pipe are full.
    await wait_for(lambda: bool(moved))
    await asyncio.sleep(0.2)
    response = await client.read_response()
    assert response.body == BODY
    client.close()
    await wait_for(lambda: count_files() <= before)


async def test_a_client_that_leaves_ends_it(edge: Edge, moved: list[int]) -> None:
    machine = await edge.machine(answer=lambda r: HEAD % (len(BODY) * 20) + BODY * 20)
    await edge.start()
    before = count_files()
    client = await edge.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    await wait_for(lambda: bool(moved))
    client.close()
    await wait_for(lambda: edge.metrics.aborted["client"] == 1)
    await wait_for(lambda: machine.connections[0].closed)
    machine.connections[0].writer.transport.abort()
    await wait_for(lambda: count_files() <= before)


async def test_an_answer_that_breaks_off_is_cut_for_the_client_too(edge: Edge, moved: list[int]) -> None:
    async def break_off(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(HEAD % (2 * len(BODY)) + BODY)
        await connection.writer.drain()

    await edge.machine(behave=break_off)
    await edge.start()
    client = await edge.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    data = await client.read_to_end()
    assert BODY.startswith(data[data.find(b"\r\n\r\n") + 4 :])
    assert moved
    assert edge.metrics.aborted["machine"] == 1


class Outcome:
    """What a splice told its owner."""

    def __init__(self) -> None:
        self.size = 0
        self.end = ""

    def handle_spliced(self, size: int, *, waits: bool) -> None:
        self.size += size

    def handle_splice_ended(self, *, rest: bool) -> None:
        self.end = "ended"

    def handle_splice_cut(self) -> None:
        self.end = "cut"

    def handle_splice_refused(self) -> None:
        self.end = "refused"


def connect() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far = listener.accept()[0]
    near.setblocking(False)
    far.setblocking(False)
    return near, far


async def test_a_reset_behind_bytes_that_wait_is_noticed() -> None:
    machine, source = connect()
    sink, client = connect()
    assert machine.send(BODY)
    machine.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    machine.close()
    outcome, pipes = Outcome(), splicing.Pipes()
    with source, sink, client:
        splice = splicing.Splice(asyncio.get_running_loop(), pipes, (source, sink), len(BODY), outcome)
        try:
            await wait_for(lambda: bool(outcome.end))
        finally:
            if not outcome.end:
                splice.stop()
    pipes.close()
    assert outcome.end == "cut"
    assert outcome.size


async def test_a_machine_that_stalls_in_it_is_given_up(edge: Edge, moved: list[int]) -> None:
    async def stall(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(HEAD % (2 * len(BODY)) + BODY)
        await connection.read()

    await edge.machine(behave=stall)
    await edge.start(stream_timeout_s=0.2)
    client = await edge.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    assert len(await client.read_to_end()) > len(BODY)
    assert moved


async def test_a_client_that_stalls_in_it_is_given_up(edge: Edge, moved: list[int]) -> None:
    machine = await edge.machine(answer=lambda r: HEAD % (len(BODY) * 20) + BODY * 20)
    await edge.start(send_timeout_s=0.2)
    client = await edge.client()
    client.writer.transport.pause_reading()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    await wait_for(lambda: edge.metrics.aborted["client"] == 1)
    assert moved
    machine.connections[0].writer.transport.abort()


async def test_without_files_to_spare_bytes_are_copied(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(splicing, "_make_pipe", refuse)
    await edge.machine(answer=lambda r: HEAD % len(BODY) + BODY)
    await edge.start()
    assert (await edge.get(b"/")).body == BODY


async def test_an_answer_in_chunks_is_not_moved(edge: Edge, moved: list[int]) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(BODY)
    await edge.machine(answer=lambda r: head + BODY + b"\r\n0\r\n\r\n")
    await edge.start()
    assert (await edge.get(b"/")).body == BODY
    assert not moved


async def test_a_compressed_answer_is_not_moved(edge: Edge, moved: list[int]) -> None:
    edge.put_app("app", "app.test", options='{"compression": true}')
    text = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 900000\r\n\r\n"
        + b"isthmus, " * 100_000
    )
    await edge.machine(answer=lambda r: text)
    await edge.start()
    response = await edge.get(b"/", b"Accept-Encoding: gzip")
    assert response.values(b"content-encoding") == [b"gzip"]
    assert not moved
