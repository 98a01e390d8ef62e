"""Two nodes with mutual TLS and a key go on replicating, whoever else knocks."""

from __future__ import annotations

import base64
import json
import os
import secrets
import signal
import socket
import ssl
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from tests.fakes.certificates import Authority
from tests.integration.processes import Node, closing_all, free_port, wait_for

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from replication.tls import TlsFiles


def config(gossip: str, join: Sequence[str], key: str, tls: TlsFiles) -> str:
    return f"""
proxy.listen = "127.0.0.1:0"
admin.listen = "127.0.0.1:0"
[gossip]
listen = "{gossip}"
join = {json.dumps(list(join))}
keys = ["{key}"]
tls_cert = "{tls.cert}"
tls_key = "{tls.key}"
tls_ca = "{tls.ca}"
"""


def make_key() -> str:
    return base64.b64encode(secrets.token_bytes(32)).decode()


def write_and_wait(source: Node, target: Node, name: str) -> None:
    insert = {"sql": "INSERT INTO apps (name) VALUES (?)", "params": [name]}
    source.change("db/exec", {"statements": [insert]})
    query = {"sql": "SELECT count(*) FROM apps WHERE name = ?", "params": [name]}
    wait_for(f"{name} at {target.id}", lambda: target.change("db/query", query)["rows"] == [[1]])


def knock(gossip: str, stack: ExitStack, connections: int, datagrams: int) -> None:
    """Send garbage, and open connections from several addresses that say nothing, or nonsense."""
    host, _, port = gossip.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for number in range(datagrams):
            stranger.sendto(os.urandom(1 + number % 1_400), (host, int(port)))
    for number in range(connections):
        source = f"127.0.2.{1 + number % 8}"
        sock = stack.enter_context(socket.create_connection((host, int(port)), 10, (source, 0)))
        with suppress(OSError):
            sock.sendall((b"", b"\x16\x03\x01\x02\x00", os.urandom(100))[number % 3])


def served_certificate(node: Node, tls: TlsFiles) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(tls.ca)
    context.load_cert_chain(tls.cert, tls.key)
    host, _, port = node.gossip.rpartition(":")
    with (
        socket.create_connection((host, int(port)), 10) as sock,
        context.wrap_socket(sock) as wrapped,
    ):
        return wrapped.getpeercert(binary_form=True) or b""


def test_strangers_cost_little_and_members_go_on(tmp_path: Path) -> None:
    key, authority = make_key(), Authority(tmp_path)
    foreign = Authority(tmp_path, "foreign")
    gossip = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    certificates = [authority.issue(name) for name in ("one", "two")]
    with closing_all() as started, ExitStack() as stack:
        for name, listen, tls in zip(("a", "b"), gossip, certificates, strict=True):
            started.append(Node(name, tmp_path, config(listen, gossip, key, tls)))
        a, b = started
        write_and_wait(a, b, "before")
        for node in (a, b):
            knock(node.gossip, stack, connections=300, datagrams=2_000)
        write_and_wait(a, b, "meanwhile")
        write_and_wait(b, a, "and-back")
        for node in (a, b):
            # All connections and some datagrams: the kernel drops others when the node is slow to read.
            wait_for("what came to be counted", lambda n=node: n.metric("isthmus_gossip_dropped_total") > 300)
            refused = [
                node.metric(f'isthmus_gossip_dropped_total{{kind="stream",reason="{reason}"}}')
                for reason in ("tls", "timeout", "too_many", "crowded_out", "io")
            ]
            assert sum(refused) > 0

        # The right key is not enough for a stream: membership hears of such a node, but no row gets to it.
        before = a.metric('isthmus_gossip_dropped_total{kind="stream",reason="tls"}')
        unsigned = replace(foreign.issue("odd"), ca=authority.file)
        odd = Node("odd", tmp_path, config(f"127.0.0.1:{free_port()}", gossip, key, unsigned))
        started.append(odd)
        wait_for(
            "the foreign certificate to be refused",
            lambda: a.metric('isthmus_gossip_dropped_total{kind="stream",reason="tls"}') > before,
        )
        assert odd.change("db/query", {"sql": "SELECT count(*) FROM apps"})["rows"] == [[0]]

        old = served_certificate(a, certificates[1])
        authority.issue("one")
        a.process.send_signal(signal.SIGHUP)
        wait_for("the renewed certificate", lambda: served_certificate(a, certificates[1]) != old)
        write_and_wait(a, b, "after")
        assert {member["state"] for member in a.show("nodes") if member["node"] in {"a", "b"}} == {"alive"}
