from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import ssl
from typing import TYPE_CHECKING

import pytest

from routing.options import parse_options
from tests.fakes.machine import FakeMachine
from tests.fakes.site_certificates import SiteAuthority

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fakes.machine import Connection
    from tests.proxy.edge import Edge

AUTHORITY = SiteAuthority()


class TlsMachine(FakeMachine):
    """A machine that speaks TLS, with a certificate for `m.test`; `mutual` asks for one as well."""

    def __init__(self, directory: Path, *, mutual: bool = False) -> None:
        super().__init__()
        path = AUTHORITY.write(directory, "m.test")
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(path, path.with_suffix(".key"))
        self.fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(path.read_text())).hexdigest()
        if mutual:
            self.context.verify_mode = ssl.CERT_REQUIRED
            self.context.load_verify_locations(cadata=AUTHORITY.pem)


async def serve(edge: Edge, machine: TlsMachine, machine_tls: object, **settings: object) -> None:
    edge.put_app("app", "app.test", options=json.dumps({"machine_tls": machine_tls}))
    edge.machines.append(await machine.start())
    edge.put_machine("m1", machine.port)
    await edge.start(**settings)


async def test_machine_that_the_authority_vouches_for_is_spoken_to_over_tls(
    edge: Edge, tmp_path: Path
) -> None:
    machine = TlsMachine(tmp_path)
    await serve(edge, machine, {"ca": AUTHORITY.pem, "server_name": "m.test"})
    assert (await edge.get()).status == 200
    assert (await edge.get()).status == 200
    assert len(machine.connections) == 1  # kept and used again


@pytest.mark.parametrize(
    ("machine_tls", "reason"),
    [
        ({"ca": SiteAuthority().pem, "server_name": "m.test"}, "not accepted"),
        ({"ca": AUTHORITY.pem, "server_name": "other.test"}, "not accepted"),
        ({"ca": AUTHORITY.pem}, "not accepted"),
        (True, "not accepted"),
        ({"fingerprint": "0" * 64}, "not the one"),
    ],
)
async def test_machine_that_is_not_vouched_for_gets_no_request(
    edge: Edge, tmp_path: Path, machine_tls: object, reason: str
) -> None:
    machine = TlsMachine(tmp_path)
    await serve(edge, machine, machine_tls)
    response = await edge.get()
    assert response.status == 502
    assert reason in response.json["message"]
    assert not machine.requests


async def test_machine_may_be_known_by_its_certificate_alone_or_by_nothing(
    edge: Edge, tmp_path: Path
) -> None:
    machine = TlsMachine(tmp_path)
    await serve(edge, machine, {"fingerprint": machine.fingerprint})
    assert (await edge.get()).status == 200
    edge.put_app("app", "app.test", options='{"machine_tls": {"verify": false}}')
    assert (await edge.get()).status == 200
    assert len(machine.connections) == 2  # other settings, another connection


async def test_what_a_machine_sent_before_it_left_arrives_though_the_client_was_slow(
    edge: Edge, tmp_path: Path
) -> None:
    async def send_and_leave(connection: Connection) -> None:
        await connection.read_request()
        connection.writer.write(b"HTTP/1.1 200 OK\r\n\r\nfirst ")
        await held.wait()
        connection.writer.write(b"last" * 10_000)
        await let_all_run()
        # As many servers do: without close_notify.
        plain = connection.writer.get_extra_info("socket").fileno()
        with socket.socket(fileno=os.dup(plain)) as sock:
            sock.shutdown(socket.SHUT_WR)
        await let_all_run()
        left.set()

    held, left = asyncio.Event(), asyncio.Event()
    machine = TlsMachine(tmp_path)
    machine.behave = send_and_leave
    await serve(edge, machine, {"verify": False})
    client = await edge.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app.test\r\nConnection: close\r\n\r\n")
    received = await client.reader.readuntil(b"first ")
    (upstream,) = edge.server._pool.connections
    upstream.pause_reading()
    held.set()
    await left.wait()
    upstream.resume_reading()
    received += await client.read_to_end()
    assert received.count(b"last") == 10_000
    assert received.endswith(b"0\r\n\r\n")


async def let_all_run() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("shown", [True, False])
async def test_machine_that_asks_for_a_certificate_is_shown_one(
    edge: Edge, tmp_path: Path, shown: bool
) -> None:
    machine = TlsMachine(tmp_path, mutual=True)
    path = AUTHORITY.write(tmp_path, "edge.test")
    certificate = f"{path}:{path.with_suffix('.key')}" if shown else ""
    await serve(edge, machine, {"verify": False}, client_certificate=certificate)
    assert (await edge.get()).status == (200 if shown else 502)


async def test_machine_that_speaks_no_tls_is_one_that_cannot_be_reached(edge: Edge) -> None:
    plain = await edge.machine()
    edge.put_app("app", "app.test", options='{"machine_tls": true}')
    plain.behave = None
    await edge.start(connect_timeout_s=0.2)
    assert (await edge.get()).status in {502, 504}
    assert not plain.requests


@pytest.mark.parametrize(
    "wish",
    [
        {"server_name": "a b"},
        {"server_name": 1},
        {"fingerprint": "00"},
        {"ca": "nothing"},
        {"verify": 0},
        {"verfy": True},
        [],
        "yes",
    ],
)
def test_malformed_wishes_are_refused(wish: object) -> None:
    with pytest.raises(ValueError, match="machine_tls"):
        parse_options(json.dumps({"machine_tls": wish}))


def test_proxy_protocol_does_not_go_together_with_it() -> None:
    with pytest.raises(ValueError, match="together"):
        parse_options('{"machine_tls": true, "proxy_protocol": "v1"}')
