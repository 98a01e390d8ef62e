"""Certificates of sites for tests, signed by an authority of their own."""

from __future__ import annotations

import datetime as dt
import ssl
from ipaddress import ip_address
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from pathlib import Path

DAY = dt.timedelta(days=1)
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class SiteAuthority:
    """Signs certificates; its own is `pem`."""

    def __init__(self) -> None:
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "site authority")])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._sign(self._name, (), self._key, -1, 365, is_authority=True)
        self.pem = self.certificate.public_bytes(Encoding.PEM).decode()

    def issue(
        self, *names: str, begin: float = -1, days: float = 30, key: Key | None = None
    ) -> tuple[str, str]:
        """Return certificate and key as PEM, valid from `begin` days from now on."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "site")])
        certificate = self._sign(subject, names, key, begin, days, is_authority=False)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return certificate.public_bytes(Encoding.PEM).decode(), pem.decode()

    def write(self, directory: Path, *names: str, file: str = "", **validity: float) -> Path:
        """Write `<first name>.crt` and `.key` into a directory; returns the former."""
        cert, key = self.issue(*names, **validity)
        path = directory / f"{file or names[0].replace('*', '_')}.crt"
        path.with_suffix(".key").write_text(key)
        path.write_text(cert)
        return path

    def client_context(self) -> ssl.SSLContext:
        """Return a context that trusts this authority alone."""
        return ssl.create_default_context(cadata=self.pem)

    def _sign(
        self,
        subject: x509.Name,
        names: tuple[str, ...],
        key: Key,
        begin: float,
        days: float,
        *,
        is_authority: bool,
    ) -> x509.Certificate:
        start = dt.datetime.now(dt.UTC) + begin * DAY
        builder = x509.CertificateBuilder(self._name, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(start).not_valid_after(start + days * DAY)
        builder = builder.add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        if names:
            known = [_general(name) for name in names]
            builder = builder.add_extension(x509.SubjectAlternativeName(known), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)
