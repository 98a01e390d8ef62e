"""The PROXY protocol: what is a header, who may send one, and what machines are told with it."""

from __future__ import annotations

import json
import socket
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.proxy_protocol import (
    V2_BYTES_MAX,
    ProxyHeaderError,
    parse_announcement,
    render_announcement,
)
from tests.fakes.machine import OK, Connection
from tests.proxy.edge import Edge, wait_for

if TYPE_CHECKING:
    from proxy.core.proxy_protocol import Announced

GET = b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n"
SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 443\r\n"
FOUR = socket.inet_aton("192.0.2.7") + socket.inet_aton("198.51.100.1") + struct.pack(">HH", 4711, 443)


def v2(body: bytes = FOUR, command: int = 0x21, family: int = 0x11, length: int | None = None) -> bytes:
    return SIGNATURE + struct.pack(">BBH", command, family, len(body) if length is None else length) + body


ENDS = (("192.0.2.7", 4711), ("198.51.100.1", 443))


@pytest.mark.parametrize(
    ("header", "ends"),
    [
        (V1, ENDS),
        (v2(), ENDS),
        (v2(FOUR + b"\x04\x00\x02ab\x03\x00\x00"), ENDS),
        (b"PROXY TCP6 2001:db8::7 2001:db8::1 0 65535\r\n", (("2001:db8::7", 0), ("2001:db8::1", 65535))),
        (b"PROXY UNKNOWN\r\n", None),
        (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", None),
        (v2(b"", 0x20, 0x00), None),
        (v2(b"anything", 0x20, 0x31), None),
        (v2(b"", 0x21, 0x00), None),
    ],
)
def test_a_header_says_who_connected_or_nothing(header: bytes, ends: tuple[object, object] | None) -> None:
    announced = parse_announcement(header + GET)
    assert announced is not None
    assert announced.size == len(header)
    assert (announced.source, announced.destination) == (ends or (None, None))


@pytest.mark.parametrize(
    "header",
    [
        GET,
        b"\r\n\r\nGET / HTTP/1.1",
        b"proxy TCP4 192.0.2.7 198.51.100.1 4711 443\r\n",
        b"PROXY  TCP4 192.0.2.7 198.51.100.1 4711 443\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 443 \r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 04711 443\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 65536\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 -1 443\r\n",
        b"PROXY TCP4 2001:db8::7 2001:db8::1 4711 443\r\n",
        b"PROXY TCP6 192.0.2.7 198.51.100.1 4711 443\r\n",
        b"PROXY TCP4 192.0.2.07 198.51.100.1 4711 443\r\n",
        b"PROXY TCP4 192.0.2.7\r\n",
        b"PROXY UDP4 192.0.2.7 198.51.100.1 4711 443\r\n",
        b"PROXY UNKNOWNX\r\n",
        b"PROXY TCP4 " + b"1" * 200,
        b"PROXY UNKNOWN " + b"x" * 107 + b"\r\n",
        v2(command=0x22),
        v2(command=0x11),
        v2(family=0x12),
        v2(family=0x31, body=b"x" * 216),
        v2(FOUR[:-1]),
        v2(family=0x21),
        v2(FOUR + b"\x04\x00"),
        v2(FOUR + b"\x04\x00\x05ab"),
        v2(b"x" * V2_BYTES_MAX),
        v2(b"", length=65_535),
    ],
)
def test_what_is_not_a_header_is_an_error(header: bytes) -> None:
    with pytest.raises(ProxyHeaderError):
        parse_announcement(header)


@given(st.sampled_from([V1, v2(), v2(FOUR + b"\x04\x00\x02ab"), b"PROXY UNKNOWN\r\n"]), st.data())
def test_a_header_that_is_changed_is_another_one_or_an_error_but_never_more(
    header: bytes, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(header) - 1))
    changed = header[:at] + data.draw(st.binary(max_size=3)) + header[at + data.draw(st.integers(0, 3)) :]
    # However it is cut, every longer part says the same or needs more, until one says what it is.
    said: list[Announced | None] = []
    failed = False
    for end in range(len(changed) + 1):
        try:
            result = parse_announcement(changed[:end])
        except ProxyHeaderError:
            failed = True
        else:
            assert not failed
            said.append(result)
    whole = [result for result in said if result is not None]
    assert len(set(whole)) <= 1
    assert not (whole and failed)
    assert all(result.size <= len(changed) for result in whole)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_header_or_an_error(data: bytes) -> None:
    for prefix in (b"", b"PROXY ", SIGNATURE):
        try:
            parse_announcement(prefix + data)
        except ProxyHeaderError:
            continue


IPS = st.ip_addresses().map(lambda address: str(getattr(address, "ipv4_mapped", None) or address))
PORTS = st.integers(0, 65_535)


@given(st.sampled_from(["v1", "v2"]), st.tuples(IPS, PORTS), st.tuples(IPS, PORTS))
def test_what_is_rendered_is_read_again(
    version: str, source: tuple[str, int], destination: tuple[str, int]
) -> None:
    header = render_announcement(version, source, destination)
    announced = parse_announcement(header)
    assert announced is not None
    assert announced.size == len(header)
    for end, told in ((source, announced.source), (destination, announced.destination)):
        assert told is not None
        assert told[1] == end[1]
        assert told[0].removeprefix("::ffff:") == end[0] or told[0].startswith("::ffff:")


@pytest.mark.parametrize("cut", [0, 1, 5, 20, len(V1)])
async def test_a_trusted_balancer_says_who_the_client_is(edge: Edge, cut: int) -> None:
    machine = await edge.machine()
    await edge.start(proxy_protocol_from=("127.0.0.0/8",))
    client = await edge.client()
    client.send(V1[:cut])
    await wait_for(lambda: len(edge.server._announcing) == 1)
    client.send(V1[cut:] + GET)
    assert (await client.read_response()).status == 200
    (request,) = machine.requests
    assert request.values(b"fly-client-ip") == request.values(b"x-forwarded-for") == [b"192.0.2.7"]
    assert not edge.server._announcing


async def test_a_client_that_is_not_trusted_cannot_announce_itself(edge: Edge) -> None:
    machine = await edge.machine()
    await edge.start(proxy_protocol_from=("10.0.0.0/8",))
    assert (await edge.exchange(V1 + GET)).error == "PH06"
    assert (await edge.get()).status == 200
    assert machine.requests[0].values(b"fly-client-ip") == [b"127.0.0.1"]


@pytest.mark.parametrize("first", [GET, b"PROXY TCP4 nonsense\r\n" + GET, SIGNATURE + b"\x00" * 20])
async def test_a_trusted_balancer_that_announces_nothing_is_cut(edge: Edge, first: bytes) -> None:
    machine = await edge.machine()
    await edge.start(proxy_protocol_from=("127.0.0.0/8",))
    client = await edge.client()
    client.send(first)
    assert await client.read_to_end() == b""
    assert machine.received == b""
    assert edge.metrics.bad_announcements == 1


async def test_a_header_that_does_not_come_is_not_waited_for(edge: Edge) -> None:
    await edge.machine()
    await edge.start(proxy_protocol_from=("127.0.0.0/8",), head_timeout_s=0.05)
    client = await edge.client()
    client.send(V1[:10])
    assert await client.read_to_end() == b""
    assert edge.metrics.bad_announcements == 1
    assert not edge.server._announcing


async def test_a_stop_does_not_wait_for_headers(edge: Edge) -> None:
    await edge.machine()
    await edge.start(proxy_protocol_from=("127.0.0.0/8",))
    client = await edge.client()
    await wait_for(lambda: len(edge.server._announcing) == 1)
    assert await edge.server.drain(5.0)
    assert await client.read_to_end() == b""


async def test_each_announced_client_has_its_own_limit_of_connections(edge: Edge) -> None:
    await edge.machine()
    await edge.start(proxy_protocol_from=("127.0.0.0/8",), connections_per_client_max=1)
    for header, status in ((V1, 200), (V1.replace(b"2.7", b"2.8"), 200), (V1, 429)):
        assert (await edge.exchange(header + GET)).status == status


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_a_machine_is_told_the_client_on_a_connection_of_its_own(edge: Edge, version: str) -> None:
    headers: list[bytes] = []

    async def behave(connection: Connection) -> None:
        data = b""
        while (announced := parse_announcement(data)) is None:
            data += await connection.read_exactly(1)
        headers.append(data)
        assert announced.source is not None
        await connection.read_request()
        connection.writer.write(OK)
        await connection.read()

    edge.put_app("app", "app.test", options=json.dumps({"proxy_protocol": version}))
    machine = await edge.machine(behave=behave)
    await edge.start(trusted_proxies=("127.0.0.0/8",), pool_idle_timeout_s=60.0)
    client = await edge.client()
    own = client.writer.get_extra_info("sockname")[1]
    assert (await client.get()).status == 200
    assert (await client.get(b"/", b"X-Forwarded-For: 2001:db8::5")).status == 200
    assert len(machine.connections) == 2
    here = ("127.0.0.1", edge.server.port)
    assert headers == [
        render_announcement(version, ("127.0.0.1", own), here),
        render_announcement(version, ("2001:db8::5", 0), here),
    ]
    await wait_for(lambda: edge.metrics.upstreams_open == 0)
