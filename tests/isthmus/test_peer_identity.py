"""Who may have requests passed on: nodes with the cluster's key or certificate, and nobody else."""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
import uvloop

from isthmus.config import ConfigError, GossipConfig
from isthmus.peer_identity import PeerIdentity
from proxy.core.peer_frames import Order, encode_open
from tests.fakes.certificates import Authority
from tests.proxy.edge import wait_for
from tests.proxy.peer_edge import NOWHERE, PeerNode, World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from tests.fakes.machine import Connection

OLD, NEW, OTHER = (base64.b64encode(bytes([i]) * 32).decode() for i in range(3))


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], uvloop.Loop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.stop()


def with_keys(node: str, *keys: str, **settings: str) -> PeerIdentity:
    return PeerIdentity(GossipConfig(keys=keys, **settings), node)


def with_file(file: Path, *keys: str) -> PeerIdentity:
    file.write_text("\n".join(keys))
    return PeerIdentity(GossipConfig(keys_file=str(file)), file.stem)


async def near_and_far(world: World, near: PeerIdentity, far: PeerIdentity) -> tuple[PeerNode, PeerNode]:
    nodes = (
        await world.node("near", "ams", listen=False, identity=near, machine_networks=NOWHERE),
        await world.node("far", "syd", identity=far),
    )
    await world.machine()
    return nodes


async def test_holders_of_the_key_serve_each_other(world: World) -> None:
    near, far = await near_and_far(world, with_keys("near", OLD), with_keys("far", OLD))
    for _ in range(3):
        assert (await near.get()).status == 200
    assert (near.peers, far.relayed) == ({"far": (3, 1, {})}, 3)
    (session,) = far.server._peer_sessions
    assert session._transport.get_extra_info("ssl_object").version() == "TLSv1.3"


async def test_keys_need_not_be_in_the_same_order(world: World) -> None:
    near, _ = await near_and_far(world, with_keys("near", NEW, OLD), with_keys("far", OLD, NEW))
    assert (await near.get()).status == 200


@pytest.mark.parametrize(
    "stranger",
    [
        lambda: with_keys("near", OTHER),
        lambda: with_keys("near", OLD, cluster="another"),
        lambda: with_keys("near"),
    ],
)
async def test_node_without_the_key_is_refused_on_both_sides(
    world: World, stranger: Callable[[], PeerIdentity]
) -> None:
    near, far = await near_and_far(world, stranger(), with_keys("far", OLD))
    response = await near.get()
    assert (response.status, far.relayed) == (502, 0)
    assert "node far" in response.json["message"]
    assert not far.server._peer_sessions


async def test_node_that_holds_another_key_does_not_get_the_request(world: World) -> None:
    near, far = await near_and_far(world, with_keys("near", OLD), with_keys("far", OTHER))
    response = await near.get()
    assert "its certificate was not accepted" in response.json["message"]
    assert far.relayed == 0


@pytest.mark.parametrize("tls", [False, True])
async def test_stranger_without_certificate_gets_nothing(world: World, tls: bool) -> None:
    _, far = await near_and_far(world, with_keys("near", OLD), with_keys("far", OLD))
    machine = far.machines[0]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", far.peering_port, ssl=context if tls else None
    )
    writer.write(encode_open(Order("m1", "app", 0, machine.port, 1, 1000, fresh=False)))
    got = b""
    with suppress(OSError):
        got = await asyncio.wait_for(reader.read(), 20)
    # In the clear an alert of TLS may come, and inside of it nothing does.
    assert not got or (not tls and got[0] == 0x15)
    await wait_for(lambda: far.server.peer_metrics.strangers)
    assert far.server.peer_metrics.strangers == {"refused": 1}
    assert not machine.connections
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


async def test_key_changes_while_requests_flow(world: World, tmp_path: Path) -> None:
    near_file, far_file = tmp_path / "near.keys", tmp_path / "far.keys"
    near_id, far_id = with_file(near_file, OLD), with_file(far_file, OLD)
    near, far = await near_and_far(world, near_id, far_id)
    for keys in ((OLD, NEW), (NEW, OLD), (NEW,)):
        for file, identity, node in ((near_file, near_id, near), (far_file, far_id, far)):
            file.write_text("\n".join(keys))
            assert identity.refresh()
            node.server.recheck_peers()
            assert (await near.get()).status == 200
        assert not near_id.refresh()
    # Connections that were made with the old key went with it.
    assert near.peers["far"][:2] == (6, 2)


async def test_request_on_a_connection_of_a_key_that_is_gone_is_told(world: World, tmp_path: Path) -> None:
    near_id, far_id = with_file(tmp_path / "near.keys", OLD), with_file(tmp_path / "far.keys", OLD)
    near, far = await near_and_far(world, near_id, far_id)
    machine = far.machines[0]

    async def never(connection: Connection) -> None:
        await connection.read_request()
        await connection.read()

    machine.behave = never
    client = await near.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 0\r\n\r\n")
    await wait_for(lambda: far.relayed == 1)
    (tmp_path / "near.keys").write_text(NEW)
    assert near_id.refresh()
    near.server.recheck_peers()
    response = await client.read_response()
    assert (response.status, response.error) == (502, "PC03")


def test_keys_of_another_configuration_are_taken_up() -> None:
    identity = with_keys("n1", OLD)
    identity.adopt(GossipConfig(keys=(OLD,)))
    assert not identity.refresh()
    identity.adopt(GossipConfig(keys=(NEW, OLD)))
    assert identity.refresh()
    assert len(identity._keys) == 2


async def test_bad_key_file_changes_nothing(world: World, tmp_path: Path) -> None:
    near_file = tmp_path / "near.keys"
    near_id = with_file(near_file, OLD)
    near, _ = await near_and_far(world, near_id, with_keys("far", OLD))
    near_file.write_text("nonsense")
    assert not near_id.refresh()
    assert (await near.get()).status == 200


async def test_certificates_of_the_authority_take_the_place_of_the_key(world: World, tmp_path: Path) -> None:
    authority = Authority(tmp_path)

    def make(name: str, key: str, of: Authority = authority) -> PeerIdentity:
        files = of.issue(name)
        return with_keys(
            name, key, tls_cert=str(files.cert), tls_key=str(files.key), tls_ca=str(authority.file)
        )

    near, far = await near_and_far(world, make("near", OLD), make("far", OTHER))
    assert (await near.get()).status == 200
    assert far.relayed == 1
    stranger = make("stranger", OLD, Authority(tmp_path, "another"))
    third = await world.node("third", "gru", listen=False, identity=stranger, machine_networks=NOWHERE)
    world.put_app()
    world.tell("far")
    world.put_machine("m1", "far", f"127.0.0.1:{far.machines[0].port}")
    assert (await third.get()).status == 502
    assert far.relayed == 1


def test_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the key file"):
        PeerIdentity(GossipConfig(keys_file=str(tmp_path / "none")), "n1")
    missing = str(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot use"):
        PeerIdentity(GossipConfig(tls_cert=missing, tls_key=missing, tls_ca=missing), "n1")


async def test_without_a_key_only_loopback_is_connected_to(world: World) -> None:
    near, far = await near_and_far(world, with_keys("near"), with_keys("far"))
    assert (await near.get()).status == 200
    world.tell("far", address=f"192.0.2.1:{far.peering_port}")
    near.server._pool.peers.close_idle()
    response = await near.get()
    assert "without a cluster key requests only go to nodes on loopback" in response.json["message"]


async def test_without_a_key_only_loopback_is_let_in(world: World) -> None:
    _, far = await near_and_far(world, with_keys("near"), with_keys("far"))
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.settimeout(5)
        far.server._peer_listener._admit(ours, "192.0.2.1")
        assert theirs.recv(1) == b""
    assert far.server.peer_metrics.strangers == {"no_key": 1}


async def test_stranger_that_says_nothing_is_cut(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.peer_listener.HANDSHAKE_TIMEOUT_S", 0.05)
    _, far = await near_and_far(world, with_keys("near", OLD), with_keys("far", OLD))
    with socket.create_connection(("127.0.0.1", far.peering_port)) as silent:
        await wait_for(lambda: far.server.peer_metrics.strangers == {"closed": 1})
        silent.settimeout(20)
        with suppress(OSError):
            assert silent.recv(1) == b""
