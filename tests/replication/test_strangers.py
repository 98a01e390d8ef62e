"""What strangers can cost a running transport, and what a key that is gone is still good for."""

import asyncio
import contextlib
import socket
from random import Random

import pytest

from replication.lobby import WAITING_MAX, WAITING_PER_NETWORK_MAX
from replication.seal import KeyRing, make_seal
from replication.settings import AgentSettings, SettingsError
from replication.transport import LinkError, Transport
from tests.replication.test_agent import eventually
from tests.replication.test_transport import KEY, Node, nodes

__all__ = ["nodes"]  # a fixture

OTHER = b"o" * 32


def ring_of(node: Node) -> KeyRing:
    ring = node.transport._seal
    assert isinstance(ring, KeyRing)
    return ring


async def connect_from(host: str, to: tuple[str, int]) -> asyncio.StreamWriter:
    _, writer = await asyncio.open_connection(*to, local_addr=(host, 0))
    return writer


async def test_half_open_connections_from_one_address_leave_room_for_others(nodes):
    a, b = nodes
    writers = [
        await connect_from("127.0.0.9", b.transport.address) for _ in range(WAITING_PER_NETWORK_MAX + 20)
    ]
    await eventually(lambda: b.transport.dropped["stream", "too_many"] == 20)
    link = await a.transport.connect(b.transport.address, lasting=True)
    assert link.send(b"x")
    await eventually(lambda: b.handler.frames == [b"x"])
    await eventually(lambda: b.transport.dropped["stream", "timeout"] == WAITING_PER_NETWORK_MAX)
    assert len(b.transport._lobby) == 0
    for writer in writers:
        writer.transport.abort()


async def test_half_open_connections_from_everywhere_push_each_other_out_and_members_get_in(nodes):
    a, b = nodes
    b.transport._handshake_timeout_s = 60
    hosts = [f"127.0.1.{number}" for number in range(1, 11)]
    writers = [await connect_from(host, b.transport.address) for host in hosts * 30]
    await eventually(lambda: b.transport.dropped["stream", "crowded_out"] == 300 - WAITING_MAX)
    link = await a.transport.connect(b.transport.address, lasting=True)
    assert link.send(b"x")
    await eventually(lambda: b.handler.frames == [b"x"])
    assert len(b.transport._lobby) == WAITING_MAX - 1
    for writer in writers:
        writer.transport.abort()
    await eventually(lambda: len(b.transport._lobby) == 0)


async def test_a_flood_of_garbage_is_counted_and_the_rest_arrives(nodes):
    a, b = nodes
    rng = Random(7)
    b.transport._handler = b.handler
    link = await a.transport.connect(b.transport.address, lasting=True)
    true = make_seal((KEY,), "c")
    heard = true.seal_datagram(b"once")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        sent = 0
        for number in range(2_000):
            kinds = (
                rng.randbytes(rng.randrange(1, 1_500)),
                heard,
                heard[: rng.randrange(len(heard))],
                bytes(byte ^ (index == number % len(heard)) for index, byte in enumerate(heard)),
                make_seal((OTHER,), "c").seal_datagram(b"x" * 50),
                b"\xd1" * 2_000,
            )
            stranger.sendto(kinds[number % len(kinds)], b.transport.address)
            sent += 1
            if number % 20 == 0:  # the kernel's buffer is not what is tested
                await eventually(lambda n=sent: b.transport.counters["datagrams_received"] == n)
                assert link.send(b"%d" % number)
        await eventually(lambda: b.transport.counters["datagrams_received"] == sent)
        stranger.setblocking(False)
        with pytest.raises(BlockingIOError):
            stranger.recv(1)  # nothing was answered
    assert b.handler.datagrams == [b"once"]
    reasons = {reason for kind, reason in b.transport.dropped if kind == "datagram"}
    assert reasons == {"magic", "truncated", "tag", "replayed", "size"}
    assert sum(b.transport.dropped.values()) == sent - 1
    await eventually(lambda: len(b.handler.frames) == 100)


async def test_a_stream_ends_with_the_key_that_it_was_made_with(nodes):
    a, b = nodes
    link = await a.transport.connect(b.transport.address, lasting=True)
    await eventually(lambda: b.handler.events == ["up"])
    for ring in (ring_of(a), ring_of(b)):
        ring.replace((KEY, OTHER))
    for ring in (ring_of(a), ring_of(b)):
        ring.replace((OTHER, KEY))
    assert link.send(b"still under the old key")
    await eventually(lambda: b.handler.frames == [b"still under the old key"])
    ring_of(b).replace((OTHER,))
    await asyncio.wait_for(link.closed.wait(), 5)
    assert b.transport.counters["links_revoked"] == 1
    again = await a.transport.connect(b.transport.address, lasting=True)
    ring_of(a).replace((OTHER,))
    assert again.send(b"under the new one")
    await eventually(lambda: b.handler.frames[1:] == [b"under the new one"])
    assert a.transport.counters["links_revoked"] == 0


async def test_a_key_that_goes_while_hands_are_shaken_makes_no_link(nodes):
    a, b = nodes
    hello = b.transport._hello

    def rotate():
        ring_of(b).replace((OTHER,))
        return hello()

    b.transport._hello = rotate
    with contextlib.suppress(LinkError, OSError):
        await a.transport.connect(b.transport.address, lasting=True)
    await eventually(lambda: b.handler.events == ["up", "down"])
    assert b.transport.counters["links_revoked"] == 1


async def test_what_we_sealed_before_a_rotation_does_not_come_back_as_a_peers(nodes):
    a, _ = nodes
    ours = ring_of(a).seal_datagram(b"x")
    ring_of(a).replace((OTHER, KEY))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(ours, a.transport.address)
        await eventually(lambda: a.transport.counters["datagrams_received"] == 1)
    assert a.handler.datagrams == []
    assert a.transport.dropped == {("datagram", "replayed"): 1}


@pytest.mark.parametrize("host", ["192.0.2.1", "8.8.8.8", "fd00::1", "example.net"])
async def test_without_a_key_nothing_is_sent_beyond_this_machine(host):
    node = Node(1)
    node.transport = Transport(
        ("127.0.0.1", 0), make_seal((), "c"), node.hello, node.handler, handshake_timeout_s=0.3
    )
    await node.start()
    node.transport.send_datagram((host, 7), b"x")
    assert node.transport.counters == {"datagrams_unsent": 1}
    with pytest.raises(LinkError, match="unsealed"):
        await node.transport.connect((host, 7), lasting=True)
    await node.transport.stop()


async def test_without_a_key_a_name_that_stands_for_more_than_loopback_is_not_bound(monkeypatch):
    node = Node(1)
    node.transport = Transport(
        ("localhost", 0), make_seal((), "c"), node.hello, node.handler, handshake_timeout_s=0.3
    )

    async def everywhere(*_args, **_kwargs):
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("0.0.0.0", 0))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", everywhere)
    with pytest.raises(OSError, match="without a cluster key"):
        await node.transport.bind()


@pytest.mark.parametrize(
    "addresses",
    [
        {"bind": ("10.0.0.1", 7946)},
        {"bind": ("127.0.0.1", 7946), "advertise": ("10.0.0.1", 7946)},
        {"bind": ("127.0.0.1", 7946), "advertise": ("node.example", 7946)},
    ],
)
def test_without_a_key_an_agent_neither_binds_nor_advertises_more_than_loopback(addresses, tmp_path):
    with pytest.raises(SettingsError, match="loopback"):
        AgentSettings("n", tmp_path / "db", **addresses)
    AgentSettings("n", tmp_path / "db", keys=(KEY,), **addresses)
