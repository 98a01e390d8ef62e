"""Why a machine is or is not chosen, and where a request would go.

Decides nothing: it says what the balancer's filters say of one machine, and at which step a lookup
ends. Invariant: `judge` says CANDIDATE only of a machine that the balancer could choose in the usual case;
filters that cannot be overruled come before those that can.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from .hosts import normalise_host, normalise_path
from .types import CheckStatus, HostnameRow, MachineState

if TYPE_CHECKING:
    from collections.abc import Collection

    from .balancer import Want
    from .peering import Ways
    from .table import RoutingTable, Service
    from .target import Target


class Verdict(Enum):
    """What a filter says of a machine; the values are stable, for metrics and the admin API."""

    CANDIDATE = "candidate"
    OVER_SOFT = "over soft limit"
    AT_HARD_LIMIT = "at hard limit"
    EJECTED = "ejected"
    UNHEALTHY = "unhealthy"
    CORDONED = "cordoned"
    NOT_STARTED = "not started"
    NO_PORT = "no port"
    EXCLUDED = "excluded"
    TRIED = "tried"
    OTHER_REGION = "other region"
    NOT_THE_INSTANCE = "not the instance"


def judge(service: Service, target: Target, now: float, want: Want, tried: Collection[str]) -> Verdict:
    """Return the first filter that drops a machine, regions and wanted instances aside."""
    verdict = Verdict.CANDIDATE
    if target.state is not MachineState.STARTED:
        verdict = Verdict.NOT_STARTED
    elif target.cordoned:
        verdict = Verdict.CORDONED
    elif service.upstream_port(target) is None:
        verdict = Verdict.NO_PORT
    elif target.id in want.exclude:
        verdict = Verdict.EXCLUDED
    elif target.id in tried:
        verdict = Verdict.TRIED
    elif service.hard_limit is not None and target.load >= service.hard_limit:
        verdict = Verdict.AT_HARD_LIMIT
    elif not target.healthy:
        verdict = Verdict.UNHEALTHY
    elif target.ejected_until > now:
        verdict = Verdict.EJECTED
    elif target.usual_load >= service.soft_limit:
        verdict = Verdict.OVER_SOFT
    return verdict


def describe(verdict: Verdict, service: Service, target: Target, now: float, ways: Ways | None = None) -> str:
    """Return a verdict with its particulars, for a person; with `ways`, also how the machine is reached."""
    detail = ""
    match verdict:
        case Verdict.NOT_STARTED:
            detail = target.state.value
        case Verdict.UNHEALTHY:
            failing = sorted(n for n, check in target.checks.items() if check.status is CheckStatus.CRITICAL)
            detail = f"{', '.join(failing)} critical"
        case Verdict.EJECTED:
            detail = f"for another {target.ejected_until - now:.1f} s, failures in a row: {target.failures}"
        case Verdict.AT_HARD_LIMIT:
            detail = f"{target.load} of {service.hard_limit}"
        case Verdict.OVER_SOFT | Verdict.CANDIDATE:
            detail = f"{target.usual_load} of {service.soft_limit}"
        case Verdict.NO_PORT:
            detail = "neither its address nor the service's internal_port names one"
        case _:
            pass
    text = f"{verdict.value}: {detail}" if detail else str(verdict.value)
    options = service.options
    through = "" if ways is None else ways.describe(target, None if options is None else options.reach)
    return f"{text}; {through}" if through else text


@dataclass(frozen=True, slots=True)
class RouteExplanation:
    """Where a lookup ended; `service` is None exactly when `reason` says why."""

    app: str | None
    service: Service | None
    reason: str


def find_hostname(table: RoutingTable, host: bytes, path: bytes) -> HostnameRow | None:
    """Return the row that RoutingTable.find_app goes by, or None; it looks at all of them."""
    name = normalise_host(host).decode("latin-1")
    dots = [index for index, char in enumerate(name) if char == "." and index]
    wanted = [name, *("*" + name[dot:] for dot in dots), "*"] if name else []
    of_name: dict[str, list[HostnameRow]] = {one: [] for one in wanted}
    for row in table.rows("hostnames").values():
        if isinstance(row, HostnameRow) and row.hostname in of_name:
            of_name[row.hostname].append(row)
    rows = next((of_name[one] for one in wanted if of_name[one]), [])
    # A less specific name never gets a second chance, whatever its prefixes.
    below = normalise_path(path).removesuffix(b"/") + b"/"
    prefixes = [(row.path_prefix.removesuffix("/").encode() + b"/", row) for row in rows]
    found = [row for prefix, row in prefixes if below.startswith(prefix)]
    return max(found, key=lambda row: len(row.path_prefix), default=None)


def explain_route(table: RoutingTable, host: bytes, path: bytes, port: int) -> RouteExplanation:
    """Return what RoutingTable.find would, with the reason when it finds nothing."""
    name = table.find_app(host, path)
    if name is None:
        return RouteExplanation(None, None, "no hostname and path prefix match")
    service = table.service(name, port)
    if service is not None:
        return RouteExplanation(name, service, "")
    app = table.app(name)
    if app is None or app.row is None:
        return RouteExplanation(name, None, f"app {name!r} has no row in apps")
    waiting = sum(map(len, app.buckets.values()))
    reason = f"app {name!r} has no service on port {port}: its {waiting} machines are not routable there"
    return RouteExplanation(name, None, reason)
