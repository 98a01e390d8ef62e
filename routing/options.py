"""What a service has of its own beside its limits: a JSON object in `services.options`.

Decides which options are acceptable; refuses to know how they are carried out. Invariant: the header of
the PROXY protocol that a service wants is one that there is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

PROXY_PROTOCOLS: Final = ("v1", "v2")


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """The options of one service; each default stands for what is not said."""

    proxy_protocol: str = ""  # the version that connections to machines begin with; empty: none
    force_https: bool = False  # requests without TLS are redirected


def parse_options(text: str) -> ServiceOptions | None:
    """Return the options, or None when there are none. Raises ValueError."""
    if text in {"{}", ""}:
        return None
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("options are not valid JSON") from None
    if not isinstance(fields, dict):
        raise ValueError("options must be a JSON object")  # noqa: TRY004 - all of a row's faults are ValueErrors
    for name in fields:
        if name not in ServiceOptions.__slots__:
            raise ValueError(f"unknown option {name[:64]!r}")
    protocol = fields.get("proxy_protocol", "")
    if protocol != "" and protocol not in PROXY_PROTOCOLS:
        raise ValueError("proxy_protocol must be v1 or v2")
    force_https = fields.get("force_https", False)
    if not isinstance(force_https, bool):
        raise ValueError("force_https must be true or false")  # noqa: TRY004 - as above
    return ServiceOptions(protocol, force_https)
