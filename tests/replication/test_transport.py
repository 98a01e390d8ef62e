"""Sockets: who is let in, what is bounded, and how links come back."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator

import pytest

from replication.core.clock import SiteId
from replication.core.member import MemberInfo
from replication.core.wire import Hello, Prune, WireError, encode
from replication.seal import make_seal
from replication.transport import SEND_BYTES_MAX, Link, LinkError, Transport
from tests.replication.test_agent import eventually

KEY = b"k" * 32


class Recorder:
    """A handler that keeps what it is given, and can be slow or find fault."""

    def __init__(self) -> None:
        self.datagrams: list[bytes] = []
        self.frames: list[bytes] = []
        self.events: list[str] = []
        self.links: list[Link] = []
        self.finds_fault = False

    def handle_datagram(self, data: bytes) -> None:
        self.datagrams.append(data)

    def handle_self(self, info: MemberInfo) -> None:
        self.events.append(f"self {info.name}")

    def handle_link_up(self, link: Link) -> None:
        self.events.append("up")
        self.links.append(link)

    def handle_frame(self, link: Link, data: bytes) -> None:
        if self.finds_fault:
            raise WireError("field")
        self.frames.append(data)

    def handle_link_down(self, link: Link) -> None:
        self.events.append("down")


class Node:
    def __init__(
        self, number: int, *, cluster: str = "c", port: int = 0, handler: Recorder | None = None
    ) -> None:
        self.handler = handler or Recorder()
        self.site = SiteId(bytes([number]) * 16)
        self.cluster = cluster
        self.transport = Transport(
            ("127.0.0.1", port), make_seal((KEY,), "c"), self.hello, self.handler, handshake_timeout_s=0.3
        )

    def hello(self) -> Hello:
        info = MemberInfo(self.site, f"n{self.site[0]}", *self.transport.address, 1)
        return Hello(self.cluster, info, lasting=False)

    async def start(self) -> "Node":
        await self.transport.bind()
        await self.transport.serve()
        return self


@pytest.fixture
async def nodes() -> AsyncIterator[list[Node]]:
    started = [await Node(1).start(), await Node(2).start()]
    yield started
    for node in started:
        await node.transport.stop()


async def test_datagrams_and_frames_arrive_and_links_know_their_peer(nodes):
    a, b = nodes
    a.transport.send_datagram(b.transport.address, b"hello")
    link = await a.transport.connect(b.transport.address, lasting=True)
    assert link.peer.site == b.site
    for number in range(200):
        assert link.send(b"%d" % number)
    await eventually(lambda: len(b.handler.frames) == 200)
    assert b.handler.frames == [b"%d" % number for number in range(200)]
    await eventually(lambda: b.handler.datagrams == [b"hello"])


async def test_a_link_that_is_retired_sends_what_was_queued_before_it_closes(nodes):
    a, b = nodes
    link = await a.transport.connect(b.transport.address, lasting=False)
    for number in range(50):
        assert link.send(b"%d" % number)
    link.retire()
    await eventually(lambda: b.handler.events == ["up", "down"])
    assert len(b.handler.frames) == 50


async def test_both_sides_hear_of_a_link_that_is_closed(nodes):
    a, b = nodes
    link = await a.transport.connect(b.transport.address, lasting=True)
    await eventually(lambda: b.handler.events == ["up"])
    link.close()
    await eventually(lambda: b.handler.events == a.handler.events == ["up", "down"])
    assert not link.send(b"too late")


async def test_a_peer_that_pauses_makes_pushes_drop_and_drain_wait_instead_of_filling_memory(nodes):
    a, b = nodes
    link = await a.transport.connect(b.transport.address, lasting=True)
    await eventually(lambda: b.handler.links)
    b.handler.links[0].pause()
    # By itself the kernel's buffer could grow until it takes all.
    link._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    frame = os.urandom(1024 * 1024)
    sent = 0
    while link.send(frame):
        sent += 1
        assert sent * len(frame) < 4 * SEND_BYTES_MAX
    assert not link.is_writable
    told: list[int] = []
    link.when_writable(lambda: told.append(len(b.handler.frames)))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not told
    b.handler.links[0].resume()
    await eventually(lambda: len(b.handler.frames) == sent)
    await eventually(lambda: told)
    assert told[0] > 0
    assert link.send(frame)


async def test_a_length_beyond_the_limit_closes_the_link_before_anything_is_read(nodes):
    a, b = nodes
    link = await a.transport.connect(b.transport.address, lasting=True)
    link._writer.write(b"\xff\xff\xff\xff")
    await asyncio.wait_for(link.closed.wait(), 5)
    assert b.transport.dropped["stream", "size"] == 1


async def test_a_frame_that_does_not_open_or_means_nothing_closes_the_link(nodes):
    a, b = nodes
    link = await a.transport.connect(b.transport.address, lasting=True)
    link._writer.write(b"\x00\x00\x00\x14" + b"x" * 20)
    await asyncio.wait_for(link.closed.wait(), 5)
    b.handler.finds_fault = True
    link = await a.transport.connect(b.transport.address, lasting=True)
    link.send(b"x")
    await asyncio.wait_for(link.closed.wait(), 5)
    assert b.transport.dropped == {("stream", "tag"): 1, ("stream", "field"): 1}


async def test_a_connection_that_says_nothing_is_closed_after_the_handshake_time(nodes):
    _, b = nodes
    reader, writer = await asyncio.open_connection(*b.transport.address)
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    assert b.transport.dropped["stream", "timeout"] == 1


async def test_a_first_message_other_than_hello_and_a_long_one_are_refused(nodes):
    _, b = nodes
    seal = make_seal((KEY,), "c")
    for first, reason in ((encode(Prune()), "hello"), (b"x" * 5_000, "size")):
        reader, writer = await asyncio.open_connection(*b.transport.address)
        handshake = seal.dial()
        writer.write(handshake.first_bytes())
        box = handshake.finish(await reader.readexactly(52))
        record = box.seal(first)
        writer.write(len(record).to_bytes(4, "big") + record)
        assert await reader.read() == b""
        writer.close()
        assert b.transport.dropped["stream", reason] == 1


async def test_a_node_does_not_talk_to_itself_or_to_another_cluster(nodes):
    a, b = nodes
    with pytest.raises(LinkError):
        await a.transport.connect(a.transport.address, lasting=True)
    assert a.transport.dropped["stream", "self"] == 1
    assert a.handler.events == ["self n1", "self n1"]
    b.cluster = "another"
    with pytest.raises(LinkError):
        await a.transport.connect(b.transport.address, lasting=True)
    assert b.transport.dropped["stream", "cluster"] == 1


async def test_a_port_that_hangs_up_or_stays_silent_fails_in_bounded_time(nodes):
    a, _ = nodes
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="Connect call failed"):
            await a.transport.connect(silent.getsockname(), lasting=True)
        silent.listen()
        with pytest.raises(TimeoutError):
            await a.transport.connect(silent.getsockname(), lasting=True)


async def test_a_datagram_to_an_address_of_another_family_is_counted_as_lost(nodes):
    a, _ = nodes
    a.transport.send_datagram(("::1", 1), b"x")
    await eventually(
        lambda: a.transport.counters["datagrams_unsent"] + a.transport.counters["datagrams_refused"]
    )
