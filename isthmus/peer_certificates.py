"""Certificates that nodes make themselves from the cluster's keys.

Decides what stands in them. Refuses to know keys of clusters, files and connections. Invariant: a certificate
of a node cannot sign others, and one made of another seed is not accepted.
"""

from __future__ import annotations

import datetime as dt

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# Clocks do not matter; RFC 5280 section 4.1.2.5 has the second as "no well-defined end".
_BEGIN = dt.datetime(2000, 1, 1, tzinfo=dt.UTC)
_END = dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC)


def make_authority(seed: bytes, name: str) -> bytes:
    """Return the certificate, in PEM, of the authority that a seed of 32 bytes stands for."""
    key = Ed25519PrivateKey.from_private_bytes(seed)
    return _sign(key, name, key.public_key(), name, is_authority=True)


def make_certificate(seed: bytes, name: str, node: str) -> bytes:
    """Return a new key and its certificate, in PEM, signed by the authority of this seed and name."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    authority = Ed25519PrivateKey.from_private_bytes(seed)
    return private + _sign(authority, name, key.public_key(), node, is_authority=False)


def _sign(
    authority: Ed25519PrivateKey, issuer: str, key: Ed25519PublicKey, subject: str, *, is_authority: bool
) -> bytes:
    builder = (
        x509.CertificateBuilder(_name(issuer), _name(subject), key, x509.random_serial_number())
        .not_valid_before(_BEGIN)
        .not_valid_after(_END)
        .add_extension(
            x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None), critical=True
        )
    )
    if not is_authority:
        purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(purposes, critical=False)
    return builder.sign(authority, None).public_bytes(serialization.Encoding.PEM)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
