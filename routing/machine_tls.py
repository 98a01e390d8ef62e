"""How a service's machines are spoken to over TLS: `machine_tls` in `services.options`.

Decides which wishes are acceptable; refuses to know certificates. Invariant: a machine is verified by
something, unless the row says in so many words that it is not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

NAMES: Final = ("server_name", "ca", "fingerprint", "verify")
_SERVER_NAME: Final = re.compile(r"[a-z0-9_](?:[a-z0-9._-]{0,251}[a-z0-9_])?")
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class MachineTls:
    """Empty texts stand for what is not said."""

    server_name: str = ""  # asked for and looked for in the certificate; else the machine's own address
    ca: str = ""  # PEM of who signs the machines' certificates; else the authorities of the system
    fingerprint: str = ""  # SHA-256 of the only certificate that will do, in hexadecimal, in place of `ca`
    verify: bool = True


def parse_machine_tls(value: object) -> MachineTls | None:
    """Return the wishes of an object, True for usual ones, None for false. Raises ValueError."""
    if isinstance(value, bool):
        return MachineTls() if value else None
    if not isinstance(value, dict):
        raise ValueError("machine_tls must be an object, true or false")  # noqa: TRY004 - as all of a row's faults
    for name in value:
        if name not in NAMES:
            raise ValueError(f"unknown option {ascii(name)[:64]} in machine_tls")
    verify = value.get("verify", True)
    texts = {name: value.get(name, "") for name in NAMES if name != "verify"}
    if not isinstance(verify, bool) or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("machine_tls holds texts, and verify is true or false")
    tls = MachineTls(**texts, verify=verify)
    if tls.server_name and not _SERVER_NAME.fullmatch(tls.server_name):
        raise ValueError("machine_tls.server_name is no host name in lower case")
    if tls.fingerprint and not _FINGERPRINT.fullmatch(tls.fingerprint):
        raise ValueError("machine_tls.fingerprint is not 64 hexadecimal digits in lower case")
    if tls.ca and "-----BEGIN CERTIFICATE-----" not in tls.ca:
        raise ValueError("machine_tls.ca is no certificate in PEM")
    return tls
