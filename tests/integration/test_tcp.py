"""Raw TCP as operators configure it: a real node with ports for an app, in the clear and with TLS."""

from __future__ import annotations

import socket
import socketserver
import threading
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING

from tests.fakes.site_certificates import SiteAuthority
from tests.integration.processes import Node, free_port, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(65_536):
            self.request.sendall(data)


@contextmanager
def echo_server() -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def connect(address: str) -> socket.socket:
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), 10)


def echoes(sock: socket.socket) -> bool:
    sock.sendall(b"hello")
    return sock.recv(5) == b"hello"


def answers(address: str) -> bool:
    with suppress(OSError), connect(address) as sock:
        return echoes(sock)
    return False


def test_node_passes_raw_connections_on_and_ends_tls_where_it_is_told(tmp_path: Path) -> None:
    authority = SiteAuthority()
    certificates = tmp_path / "certificates"
    certificates.mkdir()
    authority.write(certificates, "db.test")
    with echo_server() as machine:
        port = free_port()
        node = Node(
            "n1",
            tmp_path,
            f"""
region = "ams"
workers = 1
proxy.listen = "127.0.0.1:0"
admin.listen = "127.0.0.1:0"
gossip.listen = "127.0.0.1:{free_port()}"
tls.certificates = ["{certificates}"]
[[tcp]]
listen = "127.0.0.1:0"
app = "db"
[[tcp]]
listen = "127.0.0.1:{port}"
app = "db"
[[apps]]
name = "db"
hosts = []
internal_port = {machine.rpartition(":")[2]}
handlers = []
[[apps.machines]]
address = "127.0.0.1"
[[apps.services]]
port = {port}
internal_port = {machine.rpartition(":")[2]}
handlers = ["tls"]
""",
        )
        with closing(node):
            raw, sealed = node.info["tcp"]
            wait_for("the worker to know the machine", lambda: answers(raw))
            with connect(raw) as sock:
                assert echoes(sock)
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(1) == b""
            context = authority.client_context()
            with connect(sealed) as sock, context.wrap_socket(sock, server_hostname="db.test") as tls:
                assert echoes(tls)
            wait_for("all to be counted", lambda: node.metric("isthmus_tcp_connections_total") == 3)
            assert node.metric("isthmus_tcp_received_bytes_total") == 15
