"""What a service has of its own beside its limits: a JSON object in `services.options`.

Decides which options are acceptable; refuses to know how they are carried out. Invariant: the lines of
`headers_added` can be written into the head of any answer as they are, and neither they nor
`headers_removed` touch what decides where an answer ends or what the proxy says itself.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Final

from .machine_tls import MachineTls, parse_machine_tls

PROXY_PROTOCOLS: Final = ("v1", "v2")
# What may be said, as in the JSON.
NAMES: Final = ("proxy_protocol", "response_headers", "maintenance", "force_https", "machine_tls")
# More is no policy but a mistake, and each costs every answer.
HEADERS_MAX: Final = 64
VALUE_CHARS_MAX: Final = 4_096
# Every node and worker holds it in memory.
PAGE_CHARS_MAX: Final = 32_768

_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64}")
_VALUE: Final = re.compile(r"[!-~](?:[ \t!-~]*[!-~])?|")
_OWN: Final = frozenset(
    ("connection", "content-length", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "via")
)
_OWN_PREFIXES: Final = ("fly-", "proxy-")


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """The options of one service; each default stands for what is not said."""

    proxy_protocol: str = ""  # the version that connections to machines begin with; empty: none
    headers_removed: frozenset[bytes] = frozenset()  # names in lower case, those that are set among them
    headers_added: bytes = b""  # whole lines
    maintenance: str = ""  # the page that every request gets; empty: none
    force_https: bool = False  # requests without TLS are redirected
    machine_tls: MachineTls | None = None  # None: machines are spoken to in the clear


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
        if name not in NAMES:
            raise ValueError(f"unknown option {name[:64]!r}")
    protocol = fields.get("proxy_protocol", "")
    if protocol != "" and protocol not in PROXY_PROTOCOLS:
        raise ValueError("proxy_protocol must be v1 or v2")
    page = fields.get("maintenance", "")
    if not isinstance(page, str) or len(page) > PAGE_CHARS_MAX:
        raise ValueError(f"maintenance must be text of at most {PAGE_CHARS_MAX} characters")
    removed, added = parse_headers(fields.get("response_headers", {}))
    force_https = fields.get("force_https", False)
    if not isinstance(force_https, bool):
        raise ValueError("force_https must be true or false")  # noqa: TRY004 - as above
    machine_tls = parse_machine_tls(fields.get("machine_tls", False))
    if machine_tls is not None and protocol:
        raise ValueError("proxy_protocol and machine_tls do not go together")
    return ServiceOptions(protocol, removed, added, page, force_https, machine_tls)


def parse_headers(headers: object) -> tuple[frozenset[bytes], bytes]:
    """Return which fields an answer loses, and the lines that it gains. Raises ValueError.

    As in Fly's `http_options.response.headers`: name -> value, list of values, or false to remove.
    """
    if not isinstance(headers, dict) or len(headers) > HEADERS_MAX:
        raise ValueError(f"response_headers must be an object of at most {HEADERS_MAX} fields")
    lines: list[str] = []
    for name, said in headers.items():
        lower = str(name).lower()
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{ascii(name)[:80]} is not the name of a header")
        if lower in _OWN or lower.startswith(_OWN_PREFIXES):
            raise ValueError(f"header {name!r} is the proxy's own")
        for value in said if isinstance(said, list | tuple) else () if said is False else (said,):
            if not isinstance(value, str) or len(value) > VALUE_CHARS_MAX or not _VALUE.fullmatch(value):
                raise ValueError(f"header {name!r} has a value that is not printable ASCII")
            lines.append(f"{name}: {value}\r\n")
    return frozenset(str(name).lower().encode("ascii") for name in headers), "".join(lines).encode("ascii")
