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

from .compression import Compression, parse_compression
from .machine_tls import MachineTls, parse_machine_tls
from .peering import Way, parse_way
from .replay_options import AS_USUAL, REPLAY_NAMES, ReplayOptions, parse_replay_options
from .scaling import NAMES as SCALING_NAMES
from .scaling import USUAL, Scaling, parse_scaling
from .stickiness import Sticky, parse_sticky

PROXY_PROTOCOLS: Final = ("v1", "v2")
# What may be said, as in the JSON.
NAMES: Final = (
    *("proxy_protocol", "response_headers", "maintenance", "force_https", "machine_tls", "compression"),
    *("handlers", "tls_versions", "idle_timeout_ms", "body_bytes_max", "reach"),
    *("pristine", "sticky", "slow_start_ms", "panic_percent", *REPLAY_NAMES),
    *SCALING_NAMES,
)
# What may be done to a connection, as on Fly, in any order; with neither its bytes are passed on as they are.
HANDLERS: Final = frozenset(("tls", "http"))
TLS_VERSIONS: Final = frozenset(("TLSv1.2", "TLSv1.3"))
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
REQUEST_ID: Final = "fly-request-id"  # may be removed, as on Fly, and not set


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """The options of one service; each default stands for what is not said."""

    proxy_protocol: str = ""  # the version that connections to machines begin with; empty: none
    headers_removed: frozenset[bytes] = frozenset()  # names in lower case, those that are set among them
    headers_added: tuple[bytes, ...] = ()  # lines without their ends
    maintenance: str = ""  # the page that every request gets; empty: none
    force_https: bool = False  # requests without TLS are redirected
    machine_tls: MachineTls | None = None  # None: machines are spoken to in the clear
    scaling: Scaling = USUAL
    is_raw: bool = False  # its connections are passed on byte by byte, and no HTTP is served
    ends_tls: bool = False  # of a raw one: after TLS has ended here; else TLS, if it is that, is passed on
    tls_versions: frozenset[str] = TLS_VERSIONS  # that clients may speak where TLS ends here
    idle_timeout_s: float = 0.0  # of raw connections; 0: the node's
    body_bytes_max: int = 0  # of a request; 0: the node's
    replay: ReplayOptions = AS_USUAL
    pristine: bool = False  # answers get nothing of the proxy's own
    hides_id: bool = False  # answers get no Fly-Request-Id
    compression: Compression | None = None  # None: answers are passed on as they are
    reach: Way | None = None  # how machines of other nodes are reached; None: as their nodes say
    sticky: Sticky | None = None  # None: each request may go to another machine
    slow_start_s: float = 0.0  # until a machine that comes to the others gets its whole share
    panic_percent: int = 0  # with fewer of the machines in reach healthy, health is ignored


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
    force_https = _parse_flag(fields, "force_https")
    machine_tls = parse_machine_tls(fields.get("machine_tls", False))
    if machine_tls is not None and protocol:
        raise ValueError("proxy_protocol and machine_tls do not go together")
    handlers = parse_handlers(fields.get("handlers", ["tls", "http"]))
    return ServiceOptions(
        *(protocol, removed, added, page, force_https, machine_tls),
        is_raw="http" not in handlers,
        scaling=parse_scaling(fields),
        ends_tls=handlers == {"tls"},
        tls_versions=parse_tls_versions(fields.get("tls_versions", list(TLS_VERSIONS))),
        idle_timeout_s=_parse_number(fields, "idle_timeout_ms") / 1_000,
        body_bytes_max=_parse_number(fields, "body_bytes_max"),
        replay=parse_replay_options(fields),
        pristine=_parse_flag(fields, "pristine"),
        hides_id=REQUEST_ID.encode("ascii") in removed,
        compression=parse_compression(fields.get("compression", False)),
        reach=parse_way(fields.get("reach", "")),
        sticky=parse_sticky(fields.get("sticky")),
        slow_start_s=_parse_number(fields, "slow_start_ms") / 1_000,
        panic_percent=_parse_number(fields, "panic_percent", 100),
    )


def _parse_flag(fields: dict[str, object], name: str) -> bool:
    flag = fields.get(name, False)
    if not isinstance(flag, bool):
        raise ValueError(f"{name} must be true or false")  # noqa: TRY004 - all of a row's faults are ValueErrors
    return flag


def parse_handlers(handlers: object) -> frozenset[str]:
    """Return what is done to connections. Raises ValueError."""
    if isinstance(handlers, list | tuple):
        named = frozenset(handler for handler in handlers if isinstance(handler, str))
        if named <= HANDLERS and all(isinstance(handler, str) for handler in handlers):
            return named
    raise ValueError("handlers must be a list of tls and http")


def parse_tls_versions(versions: object) -> frozenset[str]:
    """Return which versions clients may speak. Raises ValueError."""
    if isinstance(versions, list | tuple) and versions:
        named = frozenset(version for version in versions if isinstance(version, str))
        if named <= TLS_VERSIONS and all(isinstance(version, str) for version in versions):
            return named
    raise ValueError("tls_versions must be a list of TLSv1.2 and TLSv1.3, with one of them at least")


def _parse_number(fields: dict[str, object], name: str, most: int = 2**53 - 1) -> int:
    number = fields.get(name, 0)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= most:
        raise ValueError(f"{name} must be a whole number, not below 0 nor above {most}")
    return number


def parse_headers(headers: object) -> tuple[frozenset[bytes], tuple[bytes, ...]]:
    """Return which fields an answer loses, and the lines that it gains. Raises ValueError.

    As in Fly's `http_options.response.headers`: name -> value, list of values, or false to remove.
    """
    if not isinstance(headers, dict) or len(headers) > HEADERS_MAX:
        raise ValueError(f"response_headers must be an object of at most {HEADERS_MAX} fields")
    lines: list[bytes] = []
    for name, said in headers.items():
        lower = str(name).lower()
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{ascii(name)[:80]} is not the name of a header")
        if lower in _OWN or (lower.startswith(_OWN_PREFIXES) and (lower != REQUEST_ID or said is not False)):
            raise ValueError(f"header {name!r} is the proxy's own")
        for value in said if isinstance(said, list | tuple) else () if said is False else (said,):
            if not isinstance(value, str) or len(value) > VALUE_CHARS_MAX or not _VALUE.fullmatch(value):
                raise ValueError(f"header {name!r} has a value that is not printable ASCII")
            lines.append(f"{name}: {value}".encode("ascii"))
    return frozenset(str(name).lower().encode("ascii") for name in headers), tuple(lines)
