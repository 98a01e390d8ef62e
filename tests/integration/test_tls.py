"""TLS as operators and clients meet it: real processes, curl, certificates that change on disk."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.fakes.site_certificates import SiteAuthority
from tests.integration.processes import Guestbook, Node, closing_all, free_port, request, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CURL = shutil.which("curl")


class Site:
    """A node with two workers, an app that wants TLS, and the directory of its certificates."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = SiteAuthority()
        self.ca = directory / "ca.pem"
        self.ca.write_text(self.authority.pem)
        self.certificates = directory / "certificates"
        self.certificates.mkdir()
        self.authority.write(self.certificates, "secure.test", "*.secure.test")
        self.machine = Guestbook("ams", "m1", directory)
        self.node: Node

    def start(self) -> Node:
        self.node = Node(
            "n1",
            self.directory,
            f"""
region = "ams"
workers = 2
proxy.listen = "127.0.0.1:0"
admin.listen = "127.0.0.1:0"
gossip.listen = "127.0.0.1:{free_port()}"
[tls]
listen = "127.0.0.1:0"
certificates = ["{self.certificates}"]
[[apps]]
name = "guestbook"
hosts = ["secure.test", "*.secure.test"]
force_https = true
[[apps.machines]]
address = "{self.machine.address}"
""",
        )
        wait_for("the machine to be routable", self.node.routable)
        return self.node

    def curl(self, url: str, *options: str) -> subprocess.CompletedProcess[str]:
        plain = self.node.proxy.rpartition(":")[2]
        secure = self.node.info["tls"].rpartition(":")[2]
        resolve = [
            f"{name}:{port}:127.0.0.1"
            for name in ("secure.test", "a.secure.test")
            for port in (plain, secure)
        ]
        return subprocess.run(
            [
                str(CURL), "--silent", "--show-error", "--max-time", "20", "--cacert", str(self.ca),
                *(part for entry in resolve for part in ("--resolve", entry)),
                *options, url.replace("PLAIN", plain).replace("SECURE", secure),
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def certificate_for(self, name: str) -> bytes | None:
        """Return what a client gets that asks for a name and trusts the authority; None if that fails."""
        host, port = self.node.info["tls"].split(":")
        with (
            suppress(OSError),
            socket.create_connection((host, int(port)), 10) as sock,
            self.authority.client_context().wrap_socket(sock, server_hostname=name) as tls,
        ):
            return tls.getpeercert(True)
        return None


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with closing_all() as started:
        made = Site(tmp_path_factory.mktemp("tls"))
        started.append(made.machine)
        started.append(made.start())
        yield made


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
def test_curl_is_served_over_tls_and_redirected_to_it(site: Site) -> None:
    served = site.curl(
        "https://secure.test:SECURE/healthz", "--write-out", " %{http_code} %{ssl_verify_result}"
    )
    assert served.stdout.endswith(" 200 0"), served
    followed = site.curl(
        "http://a.secure.test:PLAIN/healthz", "--location", "--write-out", " %{http_code} %{url_effective}"
    )
    assert f" 200 https://a.secure.test:{site.node.info['tls'].rpartition(':')[2]}/healthz" in followed.stdout
    plain = site.curl("http://secure.test:SECURE/", "--write-out", " %{http_code}")
    assert "PT10" in plain.stdout
    assert plain.stdout.endswith(" 400")
    unknown = site.curl("https://127.0.0.1:SECURE/")
    assert unknown.returncode == 35, unknown
    assert "unrecognized name" in unknown.stderr


def test_new_certificate_is_taken_up_and_a_bad_one_is_not(site: Site) -> None:
    authority, directory = site.authority, site.certificates
    first = site.certificate_for("secure.test")
    assert first is not None
    authority.write(directory, "secure.test", days=60)
    site.node.process.send_signal(signal.SIGHUP)
    renewed = wait_for(
        "the new certificate", lambda: (now := site.certificate_for("secure.test")) != first and now
    )
    (directory / "secure.test.key").write_text(authority.issue("other.test")[1])
    site.node.process.send_signal(signal.SIGHUP)
    wait_for("the refusal", lambda: site.node.metric("isthmus_tls_certificates_refused") == 1)
    for _ in range(6):  # both workers
        assert site.certificate_for("secure.test") == renewed
    assert "is not that of the certificate" in site.node.said()
    # Noticed without a signal as well.
    authority.write(directory, "secure.test", days=90)
    wait_for("the one after it", lambda: site.certificate_for("secure.test") not in {None, renewed})
    wait_for("no refusal", lambda: site.node.metric("isthmus_tls_certificates_refused") == 0)
    assert site.node.metric("isthmus_tls_certificates") == 1
    assert site.node.metric("isthmus_tls_handshakes_total") >= 9


def test_restarted_worker_serves_tls_again(site: Site) -> None:
    wait_for("two workers", lambda: len(site.node.worker_pids()) == 2)
    for pid in site.node.worker_pids():
        os.kill(pid, signal.SIGKILL)
    wait_for("TLS again", lambda: site.certificate_for("secure.test"))
    assert request(site.node.proxy, "/healthz", headers={"Host": "secure.test"}).status == 301


def test_node_without_a_usable_certificate_does_not_start(site: Site, tmp_path: Path) -> None:
    (tmp_path / "bad.crt").write_text("nothing")
    with pytest.raises(AssertionError, match=r"bad\.crt: there is no certificate in it"):
        Node(
            "n2",
            tmp_path,
            'proxy.listen = "127.0.0.1:0"\nadmin.listen = "127.0.0.1:0"\n'
            f'gossip.listen = "127.0.0.1:{free_port()}"\n'
            f'[tls]\nlisten = "127.0.0.1:0"\ncertificates = ["{tmp_path / "bad.crt"}"]\n',
        )
