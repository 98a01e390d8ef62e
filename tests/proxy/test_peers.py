"""Requests for machines of other nodes, through those nodes, over real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from proxy.core.peer_frames import (
    CLEAN,
    DATA,
    ENDED,
    GOODBYE,
    KEPT,
    LOST,
    OPENED,
    REFUSED,
    Order,
    encode_frame,
    encode_hello,
    encode_open,
    encode_release,
)
from tests.fakes.machine import OK, Connection, Request
from tests.proxy.edge import wait_for
from tests.proxy.peer_edge import NOWHERE, PeerNode, World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.stop()


async def near_and_far(world: World, **near: object) -> tuple[PeerNode, PeerNode]:
    """A node that may not connect to any machine itself, and one that may."""
    far = await world.node("far", "syd")
    return await world.node("near", "ams", machine_networks=NOWHERE, **near), far


async def test_request_goes_through_the_owner_and_the_machine_sees_what_it_would_see(world: World) -> None:
    near, far = await near_and_far(world)
    machine = await world.machine()
    response = await near.get(b"/a?b=c", b"X-Mine: 1", b"isthmus-machine: m9", b"Isthmus_Hops: 7")
    assert (response.status, response.body) == (200, b"ok")
    (request,) = machine.requests
    assert request.line == b"GET /a?b=c HTTP/1.1"
    assert request.values(b"x-forwarded-for") == [b"127.0.0.1"]
    assert request.values(b"fly-region") == [b"ams"]
    assert request.values(b"fly-request-id") == response.values(b"fly-request-id")
    assert request.values(b"x-mine") == [b"1"]
    assert b"isthmus" not in request.head.lower().replace(b"via: 1.1 isthmus", b"")
    assert (near.peers, far.relayed) == ({"far": (1, 1, {})}, 1)
    assert near.metrics.upstreams == 1  # that to the other node


async def test_connections_between_nodes_and_to_machines_are_kept(world: World) -> None:
    near, far = await near_and_far(world)
    machine = await world.machine()
    other = await world.machine("m2", app="other")
    client = await near.client()
    for _ in range(3):
        assert (await client.get()).status == 200
        client.send(b"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n")
        assert (await client.read_response()).status == 200
    assert near.peers == {"far": (6, 1, {})}
    assert far.relayed == 6
    assert [len(machine.connections), len(other.connections)] == [1, 1]


@pytest.mark.parametrize("size", [0, 5, 300_000, 3_000_000])
async def test_bodies_go_both_ways(world: World, size: int) -> None:
    near, _ = await near_and_far(world)
    body = bytes(range(256)) * (size // 256 + 1)

    def echo(request: Request) -> bytes:
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(request.body) + request.body

    machine = await world.machine(answer=echo)
    client = await near.client()
    for _ in range(2):
        client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: %d\r\n\r\n" % size + body[:size])
        response = await client.read_response()
        assert (response.status, response.body) == (200, body[:size])
    assert len(machine.requests) == 2


async def test_chunks_and_the_end_of_a_connection_end_bodies_as_they_do_directly(world: World) -> None:
    near, _ = await near_and_far(world)
    answers = {
        b"GET /chunked HTTP/1.1": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
        b"0\r\n\r\n",
        b"GET /close HTTP/1.1": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno",
        b"HEAD /head HTTP/1.1": b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n",
        b"GET /empty HTTP/1.1": b"HTTP/1.1 204 No Content\r\n\r\n",
        b"GET /early HTTP/1.1": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK,
    }

    async def behave(connection: Connection) -> None:
        request = await connection.read_request()
        if request.line == b"GET /until HTTP/1.1":
            connection.writer.write(b"HTTP/1.1 200 OK\r\n\r\nuntil the end")
            return
        while True:
            connection.writer.write(answers[request.line])
            if request.line == b"GET /close HTTP/1.1":
                return
            request = await connection.read_request()

    await world.machine(behave=behave)
    client = await near.client()
    assert (await client.get(b"/chunked")).body == b"abc"
    assert (await client.get(b"/until")).body == b"until the end"
    assert (await client.get(b"/close")).body == b"no"
    assert (await client.get(b"/empty")).status == 204
    assert (await client.get(b"/early")).status == 103
    assert (await client.read_response()).body == b"ok"
    client.send(b"HEAD /head HTTP/1.1\r\nHost: app.test\r\n\r\n")
    assert (await client.read_response(to_head=True)).values(b"content-length") == [b"1234"]
    assert near.peers["far"][1] == 1  # all on one connection between the nodes


async def test_an_answer_cut_short_by_its_machine_is_cut_short_for_the_client(world: World) -> None:
    near, _ = await near_and_far(world)

    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
        await connection.writer.drain()

    await world.machine(behave=behave)
    client = await near.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    assert (await client.read_to_end()).endswith(b"abc")
    assert near.metrics.aborted["machine"] == 1


async def test_replay_comes_back_to_the_node_that_has_the_body(world: World) -> None:
    near, far = await near_and_far(world)
    asked = b"HTTP/1.1 200 OK\r\nfly-replay: instance=m2;state=s\r\nContent-Length: 0\r\n\r\n"
    first = await world.machine("m1", answer=lambda request: asked)
    second = await world.machine("m2")
    world.put_machine("m2", "far", f"127.0.0.1:{second.port}")
    client = await near.client()
    client.send(
        b"POST / HTTP/1.1\r\nHost: app.test\r\nfly-force-instance-id: m1\r\nContent-Length: 4\r\n\r\nbody"
    )
    assert (await client.read_response()).status == 200
    assert [request.body for request in (*first.requests, *second.requests)] == [b"body", b"body"]
    assert b"instance=m1" in second.requests[0].values(b"fly-replay-src")[0]
    assert far.relayed == 2


async def test_replay_that_reaches_nobody_through_a_node_falls_back(world: World) -> None:
    near, _ = await near_and_far(world)

    def answer(request: Request) -> bytes:
        asks = b"HTTP/1.1 200 OK\r\nfly-replay: instance=m0;fallback=prefer_self\r\nContent-Length: 0\r\n\r\n"
        return OK if request.values(b"fly-replay-failed") else asks

    machine = await world.machine("m1", answer=answer)
    world.put_machine("m0", "far", "127.0.0.1:1")
    assert (await near.get(b"/", b"fly-force-instance-id: m1")).status == 200
    assert b"instance=m0" in machine.requests[1].values(b"fly-replay-failed")[0]


@pytest.mark.parametrize("parts", [(b"0123456789",), (b"01234", b"56789")])
async def test_body_that_is_not_kept_is_not_sent_before_its_machine_is_reached(
    world: World, parts: tuple[bytes, ...]
) -> None:
    near, _ = await near_and_far(world, replay_body_bytes_max=2)
    machine = await world.machine()
    world.put_machine("m0", "far", "127.0.0.1:1")
    client = await near.client()
    assert (await client.get(b"/", b"fly-force-instance-id: m1")).status == 200
    client.send(
        b"POST / HTTP/1.1\r\nHost: app.test\r\nfly-prefer-instance-id: m0\r\nContent-Length: 10\r\n\r\n"
    )
    for part in parts:
        client.send(part)
        await wait_for(lambda: near.peers["far"][0] >= 2)
    assert (await client.read_response()).status == 200
    assert machine.requests[1].body == b"0123456789"
    assert near.table.machine("m0").failures


async def test_upgraded_connections_pass_both_ways_and_end_with_either_side(world: World) -> None:
    near, far = await near_and_far(world)
    ended = asyncio.Event()

    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello"
        )
        while data := await connection.read():
            connection.writer.write(data.upper())
            if data == b"bye":
                return
        ended.set()

    await world.machine(behave=behave)
    upgrade = b"GET / HTTP/1.1\r\nHost: app.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    client = await near.client()
    client.send(upgrade)
    assert (await client.read_response()).status == 101
    assert await client.read(5) == b"hello"
    client.send(b"abc")
    assert await client.read(3) == b"ABC"
    assert far.table.machine("m1").in_flight == 0
    client.close()
    await ended.wait()
    client = await near.client()
    client.send(upgrade)
    assert (await client.read_response()).status == 101
    client.send(b"bye")
    assert await client.read_to_end() == b"helloBYE"


async def test_machine_that_refuses_is_left_for_the_next_one(world: World) -> None:
    near, far = await near_and_far(world)
    await world.machine()
    world.put_machine("m0", "far", "127.0.0.1:1")
    client = await near.client()
    for _ in range(8):
        client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 2\r\n\r\nab")
        assert (await client.read_response()).status == 200
    assert near.peers["far"][2].keys() == {"refused"}
    assert near.table.machine("m0").failures
    assert far.server.peer_metrics.refusals.keys() == {"PC01"}


async def test_error_says_that_it_was_the_other_node_that_could_not(world: World) -> None:
    near, _ = await near_and_far(world)
    await world.node("third", listen=False)
    world.put_app()
    world.put_machine("m0", "far", "127.0.0.1:1")
    response = await near.get()
    assert response.status == 502
    assert "through node far: 127.0.0.1:1 refused the connection" in response.json["message"]


async def test_kept_connection_that_the_machine_closed_is_made_anew(world: World) -> None:
    near, _ = await near_and_far(world)

    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(OK)
        await connection.read_until(b"\r\n\r\n")  # and closes, without an answer

    machine = await world.machine(behave=behave)
    client = await near.client()
    for _ in range(3):
        assert (await client.get()).status == 200
    assert len(machine.connections) == 3
    assert near.peers["far"][1] == 1


async def test_machine_has_as_long_to_answer_as_it_has_directly(world: World) -> None:
    near, _ = await near_and_far(world, response_timeout_s=0.1)

    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(OK)
        await connection.read_request()
        await connection.read()

    await world.machine(behave=behave)
    client = await near.client()
    assert (await client.get()).status == 200
    response = await client.get()  # sent before its machine is known to be reached
    assert (response.status, response.error) == (504, "PC05")


async def test_machine_that_is_reached_again_has_not_failed(world: World) -> None:
    near, _ = await near_and_far(world)
    machine = await world.machine()
    target = near.table.machine("m1")
    assert (await near.get()).status == 200
    target.failures = 1
    assert (await near.get()).status == 200
    assert target.failures == 0
    assert len(machine.connections) == 1


async def test_what_is_not_safe_to_send_twice_is_not(world: World) -> None:
    near, _ = await near_and_far(world)

    async def behave(connection: Connection) -> None:
        await connection.read_request()

    first = await world.machine("m1", behave=behave)
    second = await world.machine("m2", behave=behave)
    client = await near.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 0\r\n\r\n")
    response = await client.read_response()
    assert (response.status, response.error) == (502, "PC03")
    assert len(first.connections) + len(second.connections) == 1


async def test_request_that_kills_its_machine_does_not_go_round(world: World) -> None:
    near, _ = await near_and_far(world)
    await world.machine("m2", app="other")
    client = await near.client()
    client.send(b"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n")
    assert (await client.read_response()).status == 200

    async def behave(connection: Connection) -> None:
        await connection.read_request()

    machine = await world.machine("m1", behave=behave)
    # The connection between the nodes was used before, but that to the machine is new.
    assert (await client.get()).status == 502
    assert len(machine.connections) == 1


async def speak_as(world: World, node: str, *answers: bytes) -> tuple[asyncio.Server, list[bytes]]:
    """Have somebody stand in for a node, who gives one answer to each OPEN; return what it gets."""
    got = [b""]

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode_hello(node))
        left = list(answers)
        while data := await reader.read(65_536):
            got[0] += data
            # OPEN is the only frame with these words.
            if b"fresh" in data or b"kept" in data:
                writer.write(left.pop(0))
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    world.nodes[node].peering_port = server.sockets[0].getsockname()[1]
    world.tell(node)
    return server, got


async def test_what_comes_late_belongs_to_nobody(world: World) -> None:
    near, _ = await near_and_far(world)
    await world.machine()
    opened, late = encode_frame(OPENED, KEPT), encode_frame(DATA, b"HTTP/1.1 200 Late\r\n\r\n")
    answer = encode_frame(DATA, OK)
    server, got = await speak_as(
        world, "far", opened + answer, late + encode_frame(ENDED, CLEAN) + opened + answer
    )
    client = await near.client()
    for _ in range(2):
        response = await client.get()
        assert (response.status, response.body) == (200, b"ok")
    assert near.peers["far"][:2] == (2, 1)
    await wait_for(lambda: got[0].count(encode_release(len(OK))) == 2)
    server.close()


@pytest.mark.parametrize("size", [0, 600_000])
async def test_request_on_a_kept_connection_that_went_silent_goes_elsewhere(world: World, size: int) -> None:
    near, _ = await near_and_far(world, connect_timeout_s=0.05)
    await world.node("third", "gru")
    await world.machine()
    await world.machine("m3", owner="third")
    server, _ = await speak_as(world, "far", encode_frame(OPENED, KEPT) + encode_frame(DATA, OK), b"", b"")
    client = await near.client()
    for body in (b"", bytes(size)):
        head = b"PUT / HTTP/1.1\r\nHost: app.test\r\nfly-prefer-instance-id: m1\r\nContent-Length: %d\r\n\r\n"
        client.send(head % len(body) + body)
        assert (await client.read_response()).status == 200
    assert near.peers["far"] == (2, 1, {"lost": 1})
    assert near.peers["third"] == (1, 1, {})
    assert not near.server._pool.peers._nodes.is_due("far", asyncio.get_running_loop().time())
    server.close()


async def test_node_refuses_what_it_does_not_know(world: World) -> None:
    _, far = await near_and_far(world)
    machine = await world.machine()
    world.put_app("other")
    order = encode_open(Order("m1", "other", 0, machine.port, 1, 1_000, fresh=False))
    reader, writer = await asyncio.open_connection("127.0.0.1", far.peering_port)
    await reader.readexactly(len(encode_hello("far")))
    writer.write(order + encode_frame(DATA, b"GET / HTTP/1.1\r\n"))
    kind, *_ = await reader.readexactly(5)
    assert kind == REFUSED
    assert not machine.connections
    writer.close()


GET = encode_frame(DATA, b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")


async def test_session_that_was_opened_before_the_goodbye_is_served(world: World) -> None:
    _, far = await near_and_far(world)
    machine = await world.machine()
    order = encode_open(Order("m1", "app", 0, machine.port, 1, 1_000, fresh=False))
    reader, writer = await asyncio.open_connection("127.0.0.1", far.peering_port)
    await reader.readexactly(len(encode_hello("far")))
    draining = asyncio.create_task(far.server.drain(10, 10))
    assert await reader.readexactly(5) == encode_frame(GOODBYE, b"")
    writer.write(order + GET)  # crossed it
    assert (await reader.readuntil(OK)).endswith(OK)
    assert not draining.done()
    writer.write(encode_release(len(OK)))
    writer.close()
    assert await draining


async def test_connection_that_waits_when_its_node_leaves_has_its_session(world: World) -> None:
    _, far = await near_and_far(world)
    machine = await world.machine()
    order = encode_open(Order("m1", "app", 0, machine.port, 1, 1_000, fresh=False))
    with socket.create_connection(("127.0.0.1", far.peering_port)) as waiting:  # nobody has taken it off yet
        draining = asyncio.create_task(far.server.drain(10, 10))
        await asyncio.sleep(0)
        reader, writer = await asyncio.open_connection(sock=waiting)
        await reader.readexactly(len(encode_hello("far")))
        writer.write(order + GET)
        assert await reader.readexactly(5) == encode_frame(GOODBYE, b"")
        assert (await reader.readuntil(OK)).endswith(OK)
        writer.close()
        assert await draining


async def test_node_that_leaves_waits_no_longer_than_is_set_for_one_that_asks_nothing(world: World) -> None:
    _, far = await near_and_far(world)
    reader, writer = await asyncio.open_connection("127.0.0.1", far.peering_port)
    await reader.readexactly(len(encode_hello("far")))
    assert await far.server.drain(10)
    assert await reader.read() == encode_frame(GOODBYE, b"")
    writer.close()


async def test_early_answer_behind_which_its_machine_closes_goes_on(world: World) -> None:
    _, far = await near_and_far(world)
    world.put_app()
    with socket.create_server(("127.0.0.1", 0)) as machine:
        port = machine.getsockname()[1]
        world.put_machine("m1", "far", f"127.0.0.1:{port}")
        reader, writer = await asyncio.open_connection("127.0.0.1", far.peering_port)
        await reader.readexactly(len(encode_hello("far")))
        writer.write(encode_open(Order("m1", "app", 0, port, 1, 1_000, fresh=False)) + GET)
        accepted = (await asyncio.to_thread(machine.accept))[0]
        await asyncio.to_thread(accepted.recv, 1)
    (upstream,) = far.server._pool.connections
    upstream.transport.pause_reading()  # so that it is a write that finds the end
    accepted.sendall(b"an early answer")
    accepted.close()  # with bytes unread: a reset
    while far.server._pool.connections:
        writer.write(encode_frame(DATA, b"more"))
        await asyncio.sleep(0)
    assert b"an early answer" in await reader.readuntil(encode_frame(ENDED, LOST))
    writer.close()


@pytest.mark.parametrize(("missed", "connections"), [(0, 1), (1, 2)])
async def test_connection_of_a_machine_is_kept_when_all_that_came_was_taken(
    world: World, missed: int, connections: int
) -> None:
    _, far = await near_and_far(world)
    machine = await world.machine()
    order = encode_open(Order("m1", "app", 0, machine.port, 1, 1_000, fresh=False))
    request = b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", far.peering_port)
    await reader.readexactly(len(encode_hello("far")))
    for _ in range(2):
        writer.write(order + encode_frame(DATA, request))
        await reader.readuntil(OK)
        writer.write(encode_release(len(OK) - missed))
    await wait_for(lambda: len(machine.requests) == 2)
    assert len(machine.connections) == connections
    writer.close()


async def test_node_that_is_gone_is_left_for_another_of_the_region(world: World) -> None:
    near, far = await near_and_far(world)
    await world.node("other", "syd")
    machine = await world.machine()
    world.put_app()
    world.put_machine("m1", "far", f"127.0.0.1:{machine.port}")
    # It takes no requests of others, so that another node is the last one.
    far.peering_port = 0
    world.tell("far", networks=["127.0.0.0/8"])
    assert (await near.get()).status == 200
    assert near.peers == {"other": (1, 1, {})}


async def test_without_any_node_to_go_through_the_answer_says_so(world: World) -> None:
    near, far = await near_and_far(world)
    await world.machine()
    world.tell("far", networks=["127.0.0.0/8"])
    far.peering_port = 0
    world.tell("far", networks=["127.0.0.0/8"])
    response = await near.get()
    assert "no node passes requests on to it" in response.json["message"]


async def test_node_that_died_gives_an_error_and_is_used_again_when_it_is_back(world: World) -> None:
    near, far = await near_and_far(world)
    await world.machine()
    assert (await near.get()).status == 200
    await far.server._peer_listener.close()
    response = await near.get()
    assert (response.status, response.error) in {(502, "PC01"), (502, "PR03")}
    assert "node far refused the connection" in response.json["message"]
    far.listen()
    assert (await near.get()).status == 200


async def test_another_machine_takes_over_when_a_node_died(world: World) -> None:
    near, far = await near_and_far(world)
    await world.machine()
    await world.node("third", "gru")
    world.put_app()
    machine = await world.machine("m3", owner="third")
    assert (await near.get(b"/", b"fly-force-instance-id: m1")).status == 200
    await far.server._peer_listener.close()
    for _ in range(4):
        assert (await near.get(b"/", b"fly-prefer-instance-id: m1")).status == 200
    assert machine.requests


async def test_silent_node_costs_no_more_than_its_time_and_then_none(world: World) -> None:
    near, far = await near_and_far(world, connect_timeout_s=0.1)

    async def stay_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    await world.machine()
    server = await asyncio.start_server(stay_silent, "127.0.0.1", 0)
    far.peering_port = server.sockets[0].getsockname()[1]
    world.tell("far")
    response = await near.get()
    assert "no connection to node far in time" in response.json["message"]
    response = await near.get()
    assert "node far: it did not answer a moment ago" in response.json["message"]
    server.close()


async def test_node_that_speaks_nonsense_gives_an_error(world: World) -> None:
    near, _ = await near_and_far(world)
    await world.machine()
    server, _ = await speak_as(world, "far", encode_frame(OPENED, KEPT) + encode_frame(99, b""))
    assert (await near.get()).status == 502
    assert near.peers["far"][2].keys() == {"lost"}
    server.close()


async def test_node_with_too_many_connections_takes_no_more(world: World) -> None:
    far = await world.node("far", "syd", connections_max=1)
    near = await world.node("near", "ams", machine_networks=NOWHERE)
    await world.machine()
    assert (await far.get()).status == 200
    response = await near.get()
    assert "node far: it closed the connection" in response.json["message"]
    far.clients[0].close()
    await wait_for(lambda: not far.server._clients)
    assert (await near.get()).status == 200
    for upstream in list(near.server._pool.connections):
        upstream.close()
    await wait_for(lambda: not far.server._peer_sessions)
    assert (await far.get()).status == 200


async def test_another_node_at_the_address_is_not_taken_for_the_one_meant(world: World) -> None:
    near, far = await near_and_far(world)
    other = await world.node("other", "gru")
    await world.machine()
    world.put_app()
    far.peering_port = other.peering_port
    world.tell("far")
    response = await near.get()
    assert "node far: it is node other" in response.json["message"]
    assert other.relayed == 0


async def test_auto_goes_through_a_node_when_connecting_fails_and_comes_back(world: World) -> None:
    near, far = await near_and_far(world)
    await world.machine()
    world.put_app(options='{"reach": "auto"}')
    assert (await near.get()).status == 200
    assert (await near.get()).status == 200
    assert far.relayed == 2
    # By now the machine can be connected to, but that is looked at only after a while.
    await near.server._pool._reach.adopt((), "", ())
    assert (await near.get()).status == 200
    assert far.relayed == 3
    near.server._pool.peers._machines._known = {
        name: (0.0, wait_s) for name, (_, wait_s) in near.server._pool.peers._machines._known.items()
    }
    assert (await near.get()).status == 200
    assert far.relayed == 4
    await wait_for(lambda: not near.server._pool.peers._machines._known)
    assert (await near.get()).status == 200
    assert far.relayed == 4


async def test_auto_without_a_node_to_go_through_fails_as_a_direct_connection_does(world: World) -> None:
    near, far = await near_and_far(world)
    await world.machine()
    world.put_app(options='{"reach": "auto"}')
    far.peering_port = 0
    world.tell("far", networks=["10.0.0.0/8"])
    assert "not in the networks that machines may be in" in (await near.get()).json["message"]
    assert not near.server._pool.peers._machines._known


async def test_auto_and_direct_do_not_go_through_a_node_without_need(world: World) -> None:
    far = await world.node("far", "syd")
    near = await world.node("near", "ams")
    await world.machine()
    for reach in ("auto", "direct"):
        world.put_app(options=json.dumps({"reach": reach}))
        assert (await near.get()).status == 200
    assert far.relayed == 0


async def test_request_is_passed_on_by_two_nodes_but_not_by_three(world: World) -> None:
    near, far = await near_and_far(world)
    gate = await world.node("gate", "syd", machine_networks=NOWHERE)
    machine = await world.machine()
    world.put_app()
    world.put_machine("m1", "far", f"127.0.0.1:{machine.port}")
    # The owner cannot be reached from `near`, where it seems to be somewhere else.
    near.table.apply("nodes", ("far",), ("far", "syd", "", 0, "", '{"networks": ["127.0.0.0/8"]}'))
    assert (await near.get()).status == 200
    assert [gate.relayed, far.relayed] == [1, 1]
    # For the owner the machine is by now somebody else's.
    await world.node("late", "syd")
    far.table.apply(
        "machines", ("m1",), ("m1", "app", "late", "syd", f"127.0.0.1:{machine.port}", "started", 0, "")
    )
    response = await near.get()
    assert "enough nodes have passed it on" in response.json["message"]
    assert world.nodes["late"].relayed == 0


async def test_machine_that_the_other_node_does_not_know_got_nothing(world: World) -> None:
    near, far = await near_and_far(world)
    machine = await world.machine()
    far.table.apply("machines", ("m1",), None)
    client = await near.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 2\r\n\r\nab")
    response = await client.read_response()
    assert "this node does not know the machine" in response.json["message"]
    assert not machine.connections


async def test_proxy_header_reaches_the_machine_and_its_connection_is_not_kept(world: World) -> None:
    near, far = await near_and_far(world)

    async def behave(connection: Connection) -> None:
        line = await connection.read_until(b"\r\n")
        assert line.startswith(b"PROXY TCP4 127.0.0.1 ")
        await connection.read_request()
        connection.writer.write(OK)
        await connection.read()

    machine = await world.machine(behave=behave)
    world.put_app(options='{"proxy_protocol": "v1"}')
    client = await near.client()
    for _ in range(2):
        assert (await client.get()).status == 200
    assert len(machine.connections) == 2
    assert near.peers == {"far": (2, 1, {})}
    await wait_for(lambda: not far.server.peer_metrics.relaying)
    assert not far.server._pool._idle


async def test_slow_client_stops_the_machine_through_both_nodes(world: World) -> None:
    near, far = await near_and_far(world)
    sent = 0

    async def behave(connection: Connection) -> None:
        nonlocal sent
        await connection.read_request()
        connection.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 40000000\r\n\r\n")
        for _ in range(400):
            connection.writer.write(bytes(100_000))
            await connection.writer.drain()
            sent += 100_000

    await world.machine(behave=behave)
    client = await near.client()
    client.writer.transport.pause_reading()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    await wait_for(lambda: any(upstream._paused for upstream in far.server._pool.connections))
    assert sent < 30_000_000
    client.writer.transport.resume_reading()
    assert len(await client.read_body_of(40_000_000)) == 40_000_000


async def test_drained_node_ends_what_it_has_and_is_left_by_the_others(world: World) -> None:
    near, far = await near_and_far(world)
    answered = asyncio.Event()

    async def behave(connection: Connection) -> None:
        while True:
            await connection.read_request()
            await answered.wait()
            connection.writer.write(OK)

    await world.machine(behave=behave)
    client = await near.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    await wait_for(lambda: far.relayed == 1)
    draining = asyncio.create_task(far.server.drain(10))
    await wait_for(lambda: next(iter(far.server._peer_sessions))._leaving)
    answered.set()
    assert (await client.read_response()).status == 200
    assert await draining
    await wait_for(lambda: not far.server._peer_sessions)
    assert (await near.get()).status == 502
