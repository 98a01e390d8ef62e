"""Machines, clients and limits that fail, through sockets."""

from __future__ import annotations

import asyncio

import pytest

from proxy.core.addresses import AddressRules, parse_address
from tests.fakes.machine import OK, Connection
from tests.proxy.edge import Edge, wait_for


async def test_a_refused_connection_goes_to_the_next_machine_at_once(edge: Edge) -> None:
    dead = await edge.machine("m1", region="ams")
    await dead.stop()
    await edge.machine("m2", region="gru")
    await edge.start()
    assert (await edge.get()).body == b"ok"
    target = edge.table.machine("m1")
    assert target is not None
    assert target.failures == 1
    assert target.in_flight == 0
    assert edge.metrics.connect_failures == {"PC01": 1}


async def test_with_nobody_to_reach_the_error_names_the_last_failure(edge: Edge) -> None:
    dead = await edge.machine("m1")
    await dead.stop()
    await edge.start()
    client = await edge.client()
    response = await client.get()
    assert (response.status, response.error) == (502, "PR03")
    assert "PC01" in response.json["message"]
    dead.port, dead.connections = dead.port, []
    await dead.start()
    assert (await client.get()).body == b"ok"


async def test_an_app_without_machines_is_unavailable_for_now(edge: Edge) -> None:
    edge.put_app("app", "app.test")
    await edge.start()
    response = await edge.get()
    assert (response.status, response.error, response.values(b"retry-after")) == (503, "PR01", [b"1"])


async def test_a_wait_for_room_is_bounded_and_ends_with_503(edge: Edge) -> None:
    edge.put_app("app", "app.test", hard=1)
    machine = await edge.machine("m1", behave=lambda c: asyncio.sleep(60))
    await edge.start(queue_timeout_s=0.05)
    busy = await edge.client()
    busy.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    await wait_for(lambda: bool(machine.connections))
    response = await edge.get()
    assert (response.status, response.error, response.values(b"retry-after")) == (503, "PR04", [b"1"])


async def test_who_waits_for_room_is_served_when_there_is(edge: Edge) -> None:
    edge.put_app("app", "app.test", hard=1)
    first = await edge.machine("m1", behave=lambda c: asyncio.sleep(60))
    await edge.start(queue_timeout_s=30.0)
    busy = await edge.client()
    busy.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    await wait_for(lambda: bool(first.connections))
    waiting = asyncio.ensure_future(edge.get())
    await wait_for(lambda: edge.metrics.queued == 1)
    # Room that no request has made is found too.
    await edge.machine("m2")
    assert (await waiting).status == 200
    assert edge.metrics.queued == 0


@pytest.mark.parametrize(("method", "status"), [(b"GET", 200), (b"PUT", 200), (b"POST", 502)])
async def test_a_stale_connection_is_replaced_when_that_is_safe(
    edge: Edge, method: bytes, status: int
) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(OK)
        if len(machine.connections) == 1:
            await connection.read_request()  # and hang up without an answer

    machine = await edge.machine(behave=behave)
    await edge.start()
    client = await edge.client()
    await client.get()
    client.send(method + b" / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 0\r\n\r\n")
    response = await client.read_response()
    assert response.status == status
    assert len(machine.connections) == (2 if status == 200 else 1)
    if status != 200:
        assert response.error == "PC03"


async def test_a_request_that_kills_its_machine_does_not_go_round(edge: Edge) -> None:
    async def die(connection: Connection) -> None:
        await connection.read_request()

    machines = [await edge.machine(f"m{i}", behave=die) for i in range(4)]
    await edge.start()
    response = await edge.get()
    assert (response.status, response.error) == (502, "PC03")
    assert sum(len(m.connections) for m in machines) == 2


async def test_a_machine_that_does_not_answer_costs_a_limited_time(edge: Edge) -> None:
    machine = await edge.machine(behave=lambda c: asyncio.sleep(60))
    await edge.start(response_timeout_s=0.05)
    client = await edge.client()
    response = await client.get()
    assert (response.status, response.error) == (504, "PC05")
    assert len(machine.connections) == 1


async def test_an_answer_that_stops_halfway_is_cut(edge: Edge) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
        await asyncio.sleep(60)

    await edge.machine(behave=behave)
    await edge.start(stream_timeout_s=0.05)
    client = await edge.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    assert (await client.read_to_end()).endswith(b"\r\n\r\nhello")


async def test_heads_must_come_within_their_time_however_they_trickle(edge: Edge) -> None:
    await edge.machine()
    await edge.start(head_timeout_s=0.15)
    client = await edge.client()
    sent = 0

    async def trickle() -> None:
        nonlocal sent
        for byte in b"GET / HTTP/1.1\r\nHost: app.test\r\nX: " + b"y" * 1000:
            client.send(bytes((byte,)))
            sent += 1
            await asyncio.sleep(0.01)

    task = asyncio.create_task(trickle())
    response = await client.read_response()
    task.cancel()
    assert (response.status, response.error) == (408, "PH09")
    assert sent < 100


async def test_a_body_that_stops_is_a_timeout_for_both_sides(edge: Edge) -> None:
    machine = await edge.machine()
    await edge.start(body_timeout_s=0.05)
    client = await edge.client()
    client.send(b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 9\r\n\r\nhello")
    assert (await client.read_response()).error == "PH09"
    await wait_for(lambda: machine.connections[0].closed)


async def test_idle_connections_are_closed_on_both_sides(edge: Edge) -> None:
    await edge.machine()
    await edge.start(keepalive_timeout_s=0.05, pool_idle_timeout_s=0.05)
    client = await edge.client()
    await client.get()
    assert await client.read_to_end() == b""
    await wait_for(lambda: edge.metrics.upstreams_open == 0)


async def test_a_client_that_never_reads_is_cut(edge: Edge) -> None:
    async def behave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 50000000\r\n\r\n")
        connection.writer.write(b"x" * 50_000_000)
        await connection.read()

    machine = await edge.machine(behave=behave)
    await edge.start(send_timeout_s=0.1)
    client = await edge.client()
    client.writer.transport.pause_reading()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
    await wait_for(lambda: bool(machine.connections) and machine.connections[0].closed)
    assert edge.metrics.connections_open == 0


async def test_pipelined_requests_wait_while_their_client_does_not_read(edge: Edge) -> None:
    machine = await edge.machine(
        # Each comes in one read, so that it is complete before the client is found to be slow.
        answer=lambda r: b"HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n" + b"x" * 50_000
    )
    await edge.start(send_timeout_s=0.5)
    client = await edge.client()
    client.writer.transport.pause_reading()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n" * 2000)
    await wait_for(lambda: edge.metrics.connections == 1 and edge.metrics.connections_open == 0)
    assert 0 < len(machine.requests) < 1000


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: app.test\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: app.test\r\nA: " + b"b" * 100_000, 431),
        (b"GET / HTTP/1.1\r\nHost: app.test\r\nA: " + b"b" * 40_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: app.test\r\n\r\n", 414),
        (b"GET /" + b"a" * 1_000_000, 414),
    ],
    ids=["count", "unfinished", "finished", "url", "endless url"],
)
async def test_what_is_too_large_is_refused_before_it_is_complete(
    edge: Edge, raw: bytes, status: int
) -> None:
    machine = await edge.machine()
    await edge.start()
    assert (await edge.exchange(raw)).status == status
    assert machine.received == b""


async def test_a_refusal_arrives_although_its_client_goes_on_sending(edge: Edge) -> None:
    await edge.machine()
    await edge.start()
    client = await edge.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\nA: " + b"b" * 8_000_000)
    transport = client.writer.transport
    transport.pause_reading()
    await wait_for(lambda: transport.is_closing() or not transport.get_write_buffer_size())
    transport.resume_reading()
    assert (await client.read_response()).status == 431


@pytest.mark.parametrize(
    ("own", "machine"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "[::ffff:127.0.0.1]"),
        ("127.0.0.1", "0.0.0.0"),
        ("127.0.0.1", "[::]"),
        ("127.0.0.1", "localhost"),
        ("localhost", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.9"),
        ("::", "127.0.0.1"),
        ("", "127.0.0.1"),
    ],
)
async def test_listeners_of_the_node_are_no_machines_however_they_are_spelled(
    edge: Edge, own: str, machine: str
) -> None:
    listener = await edge.machine("m1")
    address = f"{machine}:{listener.port}"
    edge.table.apply("machines", ("m1",), ("m1", "app", "node1", "ams", address, "started", 0, ""))
    assert not edge.table.rejected
    await edge.start(forbidden_addresses=((own, listener.port), ("x" * 70, 1)))
    response = await edge.get()
    assert (response.status, response.error) == (502, "PR03")
    assert listener.connections == []


@pytest.mark.parametrize("address", ["169.254.169.254:80", "[::ffff:169.254.169.254]:80", "[fe80::1]:80"])
async def test_link_local_addresses_are_no_machines(edge: Edge, address: str) -> None:
    edge.put_app("app", "app.test")
    edge.table.apply("machines", ("m1",), ("m1", "app", "node1", "ams", address, "started", 0, ""))
    await edge.start()
    response = await edge.get()
    assert response.error == "PR03"
    assert "link-local" in response.json["message"]


def test_a_wildcard_listener_does_not_forbid_its_port_on_other_hosts() -> None:
    rules = AddressRules((), [(parse_address("0.0.0.0"), 8080)])
    assert rules.explain_refusal(parse_address("10.9.9.9"), 8080, lambda a: False) is None
    assert rules.explain_refusal(parse_address("10.9.9.9"), 8080, lambda a: True) is not None
    assert rules.explain_refusal(parse_address("10.9.9.9"), 8081, lambda a: True) is None


async def test_a_machine_name_that_is_none_is_a_failed_connection(edge: Edge) -> None:
    edge.put_app("app", "app.test")
    await edge.start()
    edge.put_machine("m1", 80)
    target = edge.table.machine("m1")
    assert target is not None
    target.named_host = "x" * 70
    assert (await edge.get()).error == "PR03"


async def test_machines_may_be_limited_to_networks(edge: Edge) -> None:
    machine = await edge.machine()
    await edge.start(machine_networks=("10.0.0.0/8",))
    assert (await edge.get()).error == "PR03"
    assert machine.connections == []
