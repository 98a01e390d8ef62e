"""Why a request would go where it goes: one question to the routing table, and all that decides the answer.

Decides the shape of what is said. Refuses to know how it is asked, and changes nothing. Invariant: the steps
are those of the proxy, in its order and by its own code: the head is parsed, the route found, the wishes read
and the machine chosen as for a request, so that what is said is what would be done.

It speaks for the table of one node. Only workers know which machines they leave out for failures of their
own, and which replays they remember; the former is told beside the verdict.
"""

from __future__ import annotations

import dataclasses
import math
import random
import urllib.parse
from collections import Counter
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Struct, field

from isthmus.admin.machine_views import sum_failing
from proxy.core.errors import ERRORS, RequestError
from proxy.core.request_head import RequestHead, parse_request_head
from proxy.core.stickiness import keep_to_machine
from proxy.core.wishes import take_wishes
from routing.balancer import Balancer, Refusal, Want
from routing.explain import Verdict, describe, explain_route, find_hostname, judge
from routing.options import ServiceOptions
from routing.types import WEIGHT_USUAL

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from proxy.settings import ProxySettings
    from routing.table import App, RoutingTable, Service
    from routing.target import Target
    from routing.types import CheckRow

# Choices that shares are estimated from: each takes some microseconds.
DRAWS = 400
# Of texts in options: a page or a certificate is not what is asked for.
_CHARS_MAX = 120

_PORTS = {"http": 80, "https": 443}
_ROOM = frozenset({Verdict.CANDIDATE, Verdict.OVER_SOFT})

Facts = dict[str, Any]


class QuestionError(ValueError):
    """The question is none that a client could ask; the message says why."""


class Question(Struct, frozen=True):
    """A request that might come: `region` is where it would come in, empty for that of the node asked."""

    url: str
    method: str = "GET"
    headers: tuple[str, ...] = ()
    region: str = field(default="", name="from")


class Sources(NamedTuple):
    """What is known beside the table."""

    settings: ProxySettings
    staleness_ms: Mapping[str, int | None]  # by node
    failing: Mapping[str, Iterable[tuple[str, int, float]]]  # by worker: machine, failures, seconds left
    now: float
    now_ms: int


class _Parsed(NamedTuple):
    scheme: str
    host: bytes
    port: int
    path: bytes
    raw: bytes


def explain(question: Question, table: RoutingTable, sources: Sources) -> Facts:
    """Return what would become of a request, and why. Raises QuestionError."""
    parsed = _parse(question)
    here = sources.settings.region
    region = question.region or here
    if not table.knows_region(region) and region != here:
        raise QuestionError(f"nobody knows a region `{region}`")
    told: Facts = {
        "question": {"method": question.method, "url": question.url, "from": region, "port": parsed.port},
        "node": sources.settings.node,
        "route": None,
        "app": None,
        "service": None,
        "options": {},
        "wish": {},
        "tiers": [],
        "machines": [],
        "staleness_ms": dict(sources.staleness_ms),
    }
    try:
        head = parse_request_head(parsed.raw, sources.settings)
        told["outcome"] = _follow(head, parsed, region, table, sources, told)
    except RequestError as error:
        told["outcome"] = _refused(error.code, error.detail)
    return told


def _parse(question: Question) -> _Parsed:
    try:
        parts = urllib.parse.urlsplit(question.url if "//" in question.url else f"http://{question.url}")
        port = parts.port
    except ValueError as error:
        raise QuestionError(f"`{question.url}` is no URL: {error}") from None
    if parts.scheme not in _PORTS or not parts.hostname:
        raise QuestionError(f"`{question.url}` is no URL with http or https and a host")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    says_host = any(line.lower().startswith("host:") for line in question.headers)
    host = () if says_host else (f"Host: {parts.netloc.rpartition('@')[2]}",)
    lines = (f"{question.method} {path} HTTP/1.1", *host, *question.headers)
    for line in lines:
        if "\r" in line or "\n" in line or (line in question.headers and ":" not in line):
            raise QuestionError(f"{line[:80]!r} is no line of a request")
    raw = "".join(f"{line}\r\n" for line in lines).encode("utf-8") + b"\r\n"
    return _Parsed(parts.scheme, parts.hostname.encode(), port or _PORTS[parts.scheme], path.encode(), raw)


def _follow(
    head: RequestHead, parsed: _Parsed, region: str, table: RoutingTable, sources: Sources, told: Facts
) -> Facts:
    """Take the steps of the proxy, note each, and return the outcome."""
    row = find_hostname(table, head.host, head.target)
    if row is not None:
        told["route"] = {
            "hostname": row.hostname,
            "path": row.path_prefix,
            "app": row.app,
            "by": row.managed_by,
        }
    found = explain_route(table, head.host, head.target, parsed.port)
    app = table.app(found.app) if found.app is not None else None
    if app is not None:
        told["app"] = _describe_app(app)
    service = found.service
    if service is None:
        return {"result": "unrouted", "code": "", "why": found.reason}
    told["service"], told["options"] = _describe_service(service), _describe_options(service.options)
    options = service.options
    if options is not None:
        if options.force_https and parsed.scheme == "http":
            return {"result": "redirect", "code": "", "why": "force_https: the client is sent to https"}
        if options.is_raw:
            return {"result": "unrouted", "code": "", "why": "the service takes raw connections, and no HTTP"}
    want = take_wishes(head, service, sources.settings)
    if options is not None and options.sticky is not None:
        want = keep_to_machine(want, head, options.sticky)
    told["wish"] = _describe_want(want)
    choice = _Choice(table, service, want, region, sources)
    told["tiers"], told["machines"] = choice.describe_tiers(), choice.describe_machines()
    if options is not None and options.maintenance:
        return {"result": "maintenance", "code": "", "why": "the option `maintenance` answers every request"}
    return choice.conclude()


# The parts


def _describe_app(app: App) -> Facts:
    row = app.row
    return {"app": app.name, "network": row.network if row else None, "by": row.managed_by if row else None}


def _describe_service(service: Service) -> Facts:
    return {
        "port": service.port,  # 0: any port
        "internal_port": service.internal_port,
        "concurrency": service.concurrency.value,
        "soft_limit": service.soft_limit,
        "hard_limit": service.hard_limit,
    }


def _describe_options(options: ServiceOptions | None) -> Facts:
    """Return those that differ from what is usual."""
    if options is None:
        return {}
    usual = ServiceOptions()
    said = {one.name: getattr(options, one.name) for one in dataclasses.fields(options)}
    return {name: _plain(value) for name, value in said.items() if value != getattr(usual, name)}


def _plain(value: Any) -> Any:
    """Return a value of an option as JSON has it."""
    told: Any = str(value)
    match value:
        case None | bool() | int() | float():
            told = value
        case str() | bytes():
            text = value if isinstance(value, str) else value.decode("latin-1")
            told = text if len(text) <= _CHARS_MAX else f"{text[:_CHARS_MAX]}…"
        case Enum():
            told = value.value
        case dict():
            told = {str(_plain(key)): _plain(item) for key, item in value.items()}
        case frozenset() | set():
            told = sorted(map(str, map(_plain, value)))
        case tuple() | list():
            told = [_plain(item) for item in value]
        case _ if dataclasses.is_dataclass(value):
            told = {one.name: _plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    return told


def _describe_want(want: Want) -> Facts:
    said: Facts = {
        "regions": list(want.regions),
        "instance": want.instance,
        "prefers": want.prefer_instance,
        "sticky_key": want.key.decode("latin-1"),
    }
    return {name: value for name, value in said.items() if value}


class _Choice:
    """The choice of a machine for one request. `shares`: how often each is chosen, of DRAWS times."""

    def __init__(
        self, table: RoutingTable, service: Service, want: Want, region: str, sources: Sources
    ) -> None:
        self._table = table
        self._service = service
        self._want = want
        self._region = region
        self._sources = sources
        self._balancer = Balancer(table, region, random.Random(0))
        self._tiers = self._balancer.tiers(service, want)
        self._verdicts: dict[str, Counter[str]] = {}  # by region
        for target in service.targets():
            self._verdicts.setdefault(target.region, Counter())[self._judge(target).value] += 1
        self._shares: Counter[str] = Counter()
        self._refusal: Refusal | None = None
        for _ in range(DRAWS):
            choice = self._balancer.choose(service, sources.now, want)
            if isinstance(choice, Refusal):
                self._refusal = choice
                break
            self._shares[choice.id] += 1

    def _judge(self, target: Target) -> Verdict:
        return judge(self._service, target, self._sources.now, self._want, ())

    def describe_tiers(self) -> list[Facts]:
        """Return the regions with machines, in the order in which they are looked through."""
        others = sorted(self._verdicts.keys() - {*self._tiers})
        return [self._describe_tier(region) for region in (*self._tiers, *others)]

    def _describe_tier(self, region: str) -> Facts:
        regions, verdicts = self._table.regions, self._verdicts[region]
        rtt_ms = regions.rtt_ms(self._region, region)
        return {
            "region": region,
            "order": self._tiers.index(region) + 1 if region in self._tiers else None,  # None: not wanted
            "rtt_ms": round(rtt_ms, 2) if math.isfinite(rtt_ms) else None,
            "rtt_from": regions.name_source(self._region, region),
            "machines": verdicts.total(),
            "with_room": sum(verdicts[verdict.value] for verdict in _ROOM),
            "verdicts": dict(verdicts),
        }

    def describe_machines(self) -> list[Facts]:
        """Return every machine of the app, nearest tier first."""
        sources = self._sources
        left_out = sum_failing(sources.failing)
        return [
            {
                "machine": target.id,
                "region": target.region,
                "node": target.node,
                "address": target.address,
                "verdict": verdict,
                "share": round(self._shares[target.id] / DRAWS, 2),
                "load": target.load,
                "load_average": target.usual_load,
                "weight": target.weight,
                "left_out": left_out.get(target.id),
                "checks": [
                    _describe_check(check, sources.now_ms) for _, check in sorted(target.checks.items())
                ],
                "staleness_ms": sources.staleness_ms.get(target.node),
            }
            for target, verdict in self._balancer.explain(self._service, sources.now, self._want)
        ]

    def conclude(self) -> Facts:
        """Return what becomes of the request."""
        refusal = self._refusal
        if refusal is None:
            ((machine, _),) = self._shares.most_common(1)
            target = next(target for target in self._service.targets() if target.id == machine)
            why = self._say_why(target)
            return {"result": "machine", "machine": machine, "region": target.region, "code": "", "why": why}
        if refusal.asleep is not None:
            why = f"{refusal.reason}; {refusal.asleep.id} is started, and the request waits for it"
            return {"result": "start", "machine": refusal.asleep.id, "code": refusal.code, "why": why}
        if refusal.at_limit:
            why = f"{refusal.reason}; the request waits for room"
            return {"result": "queue", "code": refusal.code, "why": why}
        return {"result": "refused", "code": refusal.code, "why": refusal.reason}

    def _say_why(self, target: Target) -> str:
        verdict, want = self._judge(target), self._want
        if want.instance is not None:
            how = describe(verdict, self._service, target, self._sources.now)
            why = f"it is the instance that was asked for ({how})"
        elif panic := self._balancer.describe_panic(self._service, want):
            why = f"panic: {panic}"
        elif verdict not in _ROOM:
            why = f"panic: nobody healthy is left, and {verdict.value} is better than nobody"
        elif want.prefer_instance == target.id:
            why = "the request prefers it, and it has room"
        elif want.key:
            why = "the sticky key leads to it"
        else:
            why = f"{self._say_where(target.region, verdict)}, and {self._say_how()}"
        return why

    def _say_where(self, region: str, verdict: Verdict) -> str:
        if verdict is Verdict.OVER_SOFT:
            limit = self._service.soft_limit
            return f"every machine in reach is over its soft limit of {limit}; {region} comes first"
        nearer = self._tiers[: self._tiers.index(region)]
        if not nearer:
            return f"{region} comes first"
        return (
            "; ".join(f"in {tier}: {_join_counts(self._verdicts[tier])}" for tier in nearer)
            + f"; {region} is next"
        )

    def _say_how(self) -> str:
        if len(self._shares) == 1:
            return "it is the only machine there that can take it"
        service = self._service
        is_uneven = service.slow_start_s or any(t.weight != WEIGHT_USUAL for t in service.targets())
        drawn = "drawn by weight" if is_uneven else "at random"
        return f"of two {drawn} the less loaded is taken"


def _join_counts(counts: Mapping[str, int]) -> str:
    """Return counts for a person."""
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _describe_check(check: CheckRow, now_ms: int) -> Facts:
    return {
        "name": check.name,
        "status": check.status.value,
        "by": check.node,
        "changed_ms_ago": max(0, now_ms - check.updated_ms) if check.updated_ms else None,
        "output": check.output,
    }


def _refused(code: str, detail: str) -> Facts:
    status, meaning = ERRORS[code]
    why = f"{status}, {meaning}: {detail}" if detail else f"{status}, {meaning}"
    return {"result": "refused", "code": code, "why": why}
