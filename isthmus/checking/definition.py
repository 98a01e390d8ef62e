"""What is to be probed: the checks of a service, as its row has them, at one machine.

Decides what each check asks for and which answers will do. Refuses to know who probes and when. Invariant: a
definition that exists can be probed: any client may write the rows, and what cannot be read is refused here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from isthmus.config import format_address
from isthmus.config_machines import CheckConfig, parse_statuses

if TYPE_CHECKING:
    from collections.abc import Iterator

    from routing.machine_tls import MachineTls
    from routing.table import RoutingTable, Service
    from routing.target import Target

_DECODER: Final = msgspec.json.Decoder(list[CheckConfig])

# What connections from a proxy begin with that speak for nobody.
_ANNOUNCEMENTS: Final = {
    "": b"",
    "v1": b"PROXY UNKNOWN\r\n",
    "v2": b"\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00",
}


class Definition(NamedTuple):
    """One check of one machine; a change in any part begins it anew."""

    machine: str
    name: str
    host: str
    port: int
    tls: MachineTls | None
    request: bytes  # what is sent; empty when a connection is enough
    check: CheckConfig

    @property
    def key(self) -> tuple[str, str]:
        """The key of its row."""
        return self.machine, self.name

    def takes_status(self, status: int) -> bool:
        """True when an answer with this status passes."""
        return any(least <= status <= most for least, most in _statuses(self.check.status))


@lru_cache(maxsize=1024)
def _statuses(said: tuple[int | str, ...]) -> tuple[tuple[int, int], ...]:
    return parse_statuses(said)


@lru_cache(maxsize=4096)
def decode_checks(raw: str) -> tuple[CheckConfig, ...]:
    """Return the checks that `services.checks` holds. Raises ValueError (msgspec's errors are such)."""
    return tuple(_DECODER.decode(raw))


def read_definitions(table: RoutingTable, target: Target) -> Iterator[Definition]:
    """Yield the checks of a machine, of all services of its app. Raises ValueError.

    A name is half of the key of a result: of two checks with one name only the first can have it.
    """
    app = table.app(target.app)
    services = sorted(app.services.values(), key=lambda service: service.port) if app is not None else ()
    seen: set[str] = set()
    for service in services:
        for definition in _of_service(target, service):
            if definition.name not in seen:
                seen.add(definition.name)
                yield definition


def _of_service(target: Target, service: Service) -> Iterator[Definition]:
    options = service.options
    tls = None if options is None else options.machine_tls
    announcement = _ANNOUNCEMENTS["" if options is None else options.proxy_protocol]
    for i, check in enumerate(decode_checks(service.checks)):
        port = check.port or service.upstream_port(target)
        if port is None:
            raise ValueError(f"neither {target.address} nor its service names a port")
        name = check.name or f"{check.type}-{i}"
        request = announcement + _render(check, target.host, port) if check.type == "http" else b""
        spoken = None if check.clear else tls
        yield Definition(target.id, name, target.host, port, spoken, request, check)


def _render(check: CheckConfig, host: str, port: int) -> bytes:
    lines = {"host": f"Host: {format_address(host, port)}"}
    lines["user-agent"] = "User-Agent: isthmus-check"
    lines["accept"] = "Accept: */*"
    lines |= {name.lower(): f"{name}: {value}" for name, value in check.headers.items()}
    head = "\r\n".join((f"{check.method} {check.path} HTTP/1.1", *lines.values()))
    return f"{head}\r\nConnection: close\r\n\r\n".encode("ascii")
