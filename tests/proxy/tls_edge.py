"""A proxy on loopback that also listens for TLS, and clients that speak it."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from proxy.certificates import Certificates
from proxy.server import Server
from proxy.tls import TlsSettings
from proxy.tls_metrics import TlsMetrics
from tests.fakes.client import RawClient
from tests.fakes.site_certificates import SiteAuthority
from tests.proxy.edge import Edge

if TYPE_CHECKING:
    from pathlib import Path


class TlsEdge(Edge):
    """An Edge with certificates in `directory`; `tls_port` is set by `start`."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.sources: tuple[str, ...] = (str(directory),)
        self.authority = SiteAuthority()
        self.tls = TlsSettings()
        self.tls_metrics = TlsMetrics()
        self.tls_port = 0

    async def start(self, **changes: object) -> None:
        self.settings = replace(self.settings, **changes)
        self.server = Server(self.settings, self.table, self.balancer, self.metrics, self.access_log)
        self.certificates = Certificates(self.sources, time.time)
        self.certificates.load()
        sock = socket.create_server(("127.0.0.1", 0))
        self.tls_port = sock.getsockname()[1]
        await self.server.start(https_port=self.tls_port)
        self.started = True
        self.server.start_tls(sock, self.tls, self.certificates, self.tls_metrics)

    def write(self, *names: str, **how: float | str) -> Path:
        return self.authority.write(self.directory, *names, **how)

    def client_context(self) -> ssl.SSLContext:
        """Trusts the authority; which name the certificate is for is the test's to look at."""
        context = ssl.create_default_context(cadata=self.authority.pem)
        context.check_hostname = False
        return context

    async def tls_client(self, name: str = "app.test", context: ssl.SSLContext | None = None) -> RawClient:
        """Connect; without a name the client sends none."""
        async with asyncio.timeout(5):
            streams = await asyncio.open_connection(
                "127.0.0.1", self.tls_port, ssl=context or self.client_context(), server_hostname=name
            )
        client = RawClient(*streams)
        self.clients.append(client)
        return client

    async def raw_client(self) -> RawClient:
        client = await RawClient.connect(self.tls_port)
        self.clients.append(client)
        return client

    async def served_names(self, name: str) -> set[str]:
        """The names of the certificate that a client gets that asks for this one."""
        client = await self.tls_client(name)
        found = client.writer.get_extra_info("peercert")
        return {value for _, value in found["subjectAltName"]}
