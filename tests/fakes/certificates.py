"""Certificates for tests: an authority, and nodes that it signed."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from replication.tls import TlsFiles

if TYPE_CHECKING:
    from pathlib import Path

DAY = dt.timedelta(days=1)


class Authority:
    """Signs certificates; its own is in `file`."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.pem = _pem(self._sign(self._name, self._key.public_key(), 365, is_authority=True))
        self.file = directory / f"{name}.pem"
        self.file.write_bytes(self.pem)

    def issue(self, name: str, days: int = 30) -> TlsFiles:
        """Write a certificate and its key, valid from yesterday for so many days."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        files = TlsFiles(self._directory / f"{name}.crt", self._directory / f"{name}.key", self.file)
        files.cert.write_bytes(_pem(self._sign(subject, key.public_key(), days, is_authority=False)))
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int, *, is_authority: bool
    ) -> x509.Certificate:
        begin = dt.datetime.now(dt.UTC) - DAY
        builder = x509.CertificateBuilder(self._name, subject, key, x509.random_serial_number())
        builder = builder.not_valid_before(begin).not_valid_after(begin + days * DAY)
        constraint = x509.BasicConstraints(ca=is_authority, path_length=None)
        builder = builder.add_extension(constraint, critical=True)
        return builder.sign(self._key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
