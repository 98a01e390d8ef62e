"""`fly-replay`: what an app asks for, and what that means here.

Decides whether an instruction is acceptable and where it leads; refuses to know how a request is
sent again. Follows Fly's "Dynamic request routing" page; where that is silent the stricter reading
is taken, because a misread instruction sends a request to the wrong machine.
Invariant: whatever the bytes, parsing returns a Replay or raises ReplayError, and everything in a
Replay except `state` is safe in a header as it is.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn
from urllib.parse import quote

from .balancer import Want
from .catalog import APP_NAME, IDENTIFIER, REGION_CODE
from .geo import ANY
from .replay_options import admits
from .transform import parse_cache, parse_transform

if TYPE_CHECKING:
    from .table import App, RoutingTable, Service
    from .target import Target
    from .transform import CacheWish, Transform

INVALID: Final = "PA03"
APP_NOT_FOUND: Final = "PA04"
APP_NOT_ALLOWED: Final = "PA05"

HEADER_BYTES_MAX: Final = 8_192  # what common servers allow for a whole header line
JSON_BYTES_MAX: Final = 65_536  # room for transforms; beyond it nobody writes an instruction
REGIONS_MAX: Final = 32  # more than a person would list; bounds the work of a choice
STATE_CHARS_MAX: Final = 4_096  # it comes back as a request header, which servers limit to 8 KiB
TIMEOUT_MS_MAX: Final = 3_600_000  # nobody waits for an hour; a longer one is a wrong unit
DETAIL_CHARS_MAX: Final = 80  # of foreign text in a message

_NAME: Final = re.compile(r"[a-z_]+")
# Not a token of RFC 9110 but visible ASCII without separators, since `state` often carries base64 or paths.
_BARE: Final = re.compile(r"[!#-+\--:<-\[\]-~]+")
_QUOTED: Final = re.compile(r'"((?:[ !#-\[\]-~]|\\[ -~])*)"')
_ESCAPE: Final = re.compile(r"\\(.)")
_TIMEOUT: Final = re.compile(r"([0-9]{1,9})(ms|s|m)")
_UNIT_MS: Final = {"ms": 1, "s": 1_000, "m": 60_000}
_FIELDS: Final = frozenset(
    (
        *("app", "elsewhere", "fallback", "instance", "prefer_instance", "region", "state", "timeout"),
        *("allow_bypass", "cache", "transform"),
    )
)
_FALLBACKS: Final = frozenset(("force_self", "prefer_self"))
# What may stand in fly-replay-src as it is: visible ASCII but for `;` and `"`. '%' stays, so that a state
# that was percent-encoded by its app comes back as that app wrote it.
_SRC_SAFE: Final = "".join(chr(c) for c in range(0x21, 0x7F) if chr(c) not in ';"')


class ReplayError(Exception):
    """An instruction that is not carried out; `code` is one of Fly's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"[{code}] {message}")
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Replay:
    """An acceptable instruction; None and () stand for what it does not say."""

    app: str | None = None
    regions: tuple[str, ...] = ()
    instance: str | None = None
    prefer_instance: str | None = None
    state: str | None = None
    elsewhere: bool = False
    timeout_ms: int | None = None
    fallback: str | None = None  # 'force_self' or 'prefer_self'
    transform: Transform | None = None
    cache: CacheWish | None = None


def parse_replay_header(value: bytes) -> Replay:
    """Read the value of one `fly-replay` header: `name=value` pairs with `;` between them.

    A value is bare or double-quoted; a list must be quoted. Space around `;` and `=` is tolerated.
    Unknown and repeated fields are refused: a typo in `instance` must not reroute in silence.
    """
    if len(value) > HEADER_BYTES_MAX:
        _refuse(f"fly-replay is longer than {HEADER_BYTES_MAX} bytes")
    try:
        text = value.decode("ascii")
    except UnicodeDecodeError:
        _refuse("fly-replay is not ASCII; the JSON form can carry other text")
    fields: dict[str, object] = {}
    end = _skip_space(text, 0)
    while True:
        name, content, end = _read_field(text, end)
        if name in fields:
            _refuse(f"field {_shorten(name)} is given twice")
        fields[name] = content
        if end == len(text):
            return _build(fields)
        if text[end] != ";":
            _refuse(f"expected ';' after field {_shorten(name)}")
        end = _skip_space(text, end + 1)


def _read_field(text: str, start: int) -> tuple[str, str, int]:
    name = _NAME.match(text, start)
    if name is None:
        _refuse(f"expected a field name at {_shorten(text[start:])}")
    end = _skip_space(text, name.end())
    if text[end : end + 1] != "=":
        _refuse(f"expected '=' after {_shorten(name[0])}")
    end = _skip_space(text, end + 1)
    quoted = _QUOTED.match(text, end)
    if quoted is not None:
        return name[0], _ESCAPE.sub(r"\1", quoted[1]), _skip_space(text, quoted.end())
    bare = _BARE.match(text, end)
    if bare is None:
        _refuse(f"field {_shorten(name[0])} has no acceptable value")
    return name[0], bare[0], _skip_space(text, bare.end())


def _skip_space(text: str, start: int) -> int:
    while text[start : start + 1] in {" ", "\t"}:
        start += 1
    return start


def parse_replay_json(body: bytes) -> Replay:
    """Read the body of an answer of type `application/vnd.fly.replay+json`; null counts as not said."""
    if len(body) > JSON_BYTES_MAX:
        _refuse(f"the replay instruction is longer than {JSON_BYTES_MAX} bytes")
    try:
        fields = json.loads(body.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        _refuse("the replay instruction is not valid JSON, or names a field twice")
    if not isinstance(fields, dict):
        _refuse("the replay instruction is not a JSON object")
    return _build({name: value for name, value in fields.items() if value is not None})


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name is given twice")
    return fields


def parse_regions(text: str) -> tuple[str, ...]:
    """Read a list of regions and areas in order of preference, as replays and client headers have it.

    Repetitions and what follows `any` say nothing and are dropped. Raises ReplayError.
    """
    codes: dict[str, None] = {}
    names = text.split(",", REGIONS_MAX)
    if len(names) > REGIONS_MAX:
        _refuse(f"more than {REGIONS_MAX} regions")
    for name in names:
        code = name.strip(" \t")
        if not REGION_CODE.fullmatch(code):
            _refuse(f"{_shorten(code)} is not a region")
        codes.setdefault(code)
        if code == ANY:
            break
    return tuple(codes)


def _build(fields: dict[str, object]) -> Replay:
    for name in fields:
        if name not in _FIELDS:
            _refuse(f"unknown field {_shorten(name)}")
    region = _text(fields, "region")
    timeout = _text(fields, "timeout")
    try:
        transform = parse_transform(fields["transform"]) if "transform" in fields else None
        cache = parse_cache(fields.get("cache"), fields.get("allow_bypass"))
    except ValueError as error:
        _refuse(str(error))
    replay = Replay(
        app=_matching(fields, "app", APP_NAME),
        regions=() if region is None else parse_regions(region),
        instance=_matching(fields, "instance", IDENTIFIER),
        prefer_instance=_matching(fields, "prefer_instance", IDENTIFIER),
        state=_parse_state(fields),
        elsewhere=_parse_elsewhere(fields),
        timeout_ms=None if timeout is None else _parse_timeout_ms(timeout),
        fallback=_text(fields, "fallback"),
        transform=transform,
        cache=cache,
    )
    if replay.fallback is not None and replay.fallback not in _FALLBACKS:
        _refuse("fallback must be force_self or prefer_self")
    if replay.instance is not None and replay.prefer_instance is not None:
        _refuse("instance and prefer_instance exclude each other")
    if not (replay.app or replay.regions or replay.instance or replay.prefer_instance or replay.elsewhere):
        _refuse("the instruction says nowhere to go")
    return replay


def _text(fields: dict[str, object], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        _refuse(f"field {name!r} must be a string")
    return value


def _matching(fields: dict[str, object], name: str, pattern: re.Pattern[str]) -> str | None:
    value = _text(fields, name)
    if value is not None and not pattern.fullmatch(value):
        _refuse(f"{name} {_shorten(value)} is malformed")
    return value


def _parse_state(fields: dict[str, object]) -> str | None:
    state = _text(fields, "state")
    if state is not None and (len(state) > STATE_CHARS_MAX or not state.isprintable()):
        _refuse(f"state must be printable and at most {STATE_CHARS_MAX} characters")
    return state


def _parse_elsewhere(fields: dict[str, object]) -> bool:
    value = fields.get("elsewhere", False)
    if value in ("true", "false"):
        return value == "true"
    if not isinstance(value, bool):
        _refuse("elsewhere must be true or false")
    return value


def _parse_timeout_ms(text: str) -> int:
    match = _TIMEOUT.fullmatch(text)
    if match is None:
        _refuse(f"timeout {_shorten(text)} is not a whole number with ms, s or m")
    timeout_ms = int(match[1]) * _UNIT_MS[match[2]]
    if not 0 < timeout_ms <= TIMEOUT_MS_MAX:
        _refuse(f"timeout {_shorten(text)} is not within 1ms and {TIMEOUT_MS_MAX // 60_000}m")
    return timeout_ms


def plan_replay(replay: Replay, source: Target, table: RoutingTable, port: int) -> tuple[Service, Want]:
    """Return the service and the choice that an instruction of `source` leads to.

    `port` is the public one that the request came in on: the target's service is looked up by it.
    Raises ReplayError PA03 for what contradicts the table, PA04 for an app that does not exist or
    serves nothing on that port, PA05 for an app of another network that does not let `source` in. A
    wanted machine that does not exist is left to the balancer, which refuses it: the instruction itself
    is in order.
    """
    name = replay.app or source.app
    app, home = table.app(name), table.app(source.app)
    if app is None or app.row is None:
        raise ReplayError(
            APP_NOT_FOUND, f"app {source.app!r} tried to replay to app {name!r}, which does not exist"
        )
    service = table.service(name, port)
    if home is not app and not _may_replay(home, app, service):
        raise ReplayError(
            APP_NOT_ALLOWED, f"app {source.app!r} may not replay to app {name!r} of another network"
        )
    if service is None or (service.options is not None and service.options.is_raw):
        raise ReplayError(
            APP_NOT_FOUND,
            f"app {source.app!r} tried to replay to app {name!r}, which serves no HTTP on port {port}",
        )
    for region in replay.regions:
        if not table.knows_region(region):
            near = table.regions.suggest(region)
            _refuse(f"unknown region {region!r}" + (f", did you mean {near!r}?" if near else ""))
    if replay.instance is not None:
        _check_instance(replay, replay.instance, name, source, table)
    exclude = frozenset((source.id,)) if replay.elsewhere else frozenset()
    return service, Want(replay.regions, replay.instance, replay.prefer_instance, exclude)


def _may_replay(home: App | None, app: App, service: Service | None) -> bool:
    """True for apps of one network, and for those that the target names."""
    if home is None or home.row is None or app.row is None:
        return False
    if home.row.network == app.row.network:
        return True
    options = None if service is None else service.options
    return options is not None and admits(options.replay.sources, home.name, home.row.network)


def _check_instance(replay: Replay, instance: str, app: str, source: Target, table: RoutingTable) -> None:
    target = table.machine(instance)
    if target is not None:
        if target.app != app:
            _refuse(f"machine {instance!r} is not of app {app!r}")
        if replay.regions and not any(table.regions.covers(name, target.region) for name in replay.regions):
            _refuse(f"machine {instance!r} is in {target.region}, which the regions leave out")
    if replay.elsewhere and instance == source.id:
        _refuse("elsewhere excludes the very machine that instance asks for")


def format_replay_src(instance: str, region: str, t_us: int, state: str | None) -> bytes:
    """Return the value of `fly-replay-src`: who asked for the replay, when, and the state it passed on.

    In `state`, `;`, `"`, space and whatever is not visible ASCII is percent-encoded (UTF-8). Raises
    ValueError for an instance or region that no accepted row can hold.
    """
    if not IDENTIFIER.fullmatch(instance) or not REGION_CODE.fullmatch(region):
        raise ValueError(f"not a machine and a region: {instance!r}, {region!r}")
    value = f"instance={instance};region={region};t={t_us}"
    if state is not None:
        value += f";state={quote(state, safe=_SRC_SAFE)}"
    return value.encode("ascii")


def _shorten(text: str) -> str:
    """Quote foreign text for a message: escaped, and not too long."""
    shown = text if len(text) <= DETAIL_CHARS_MAX else text[:DETAIL_CHARS_MAX] + "…"
    return ascii(shown)


def _refuse(message: str) -> NoReturn:
    raise ReplayError(INVALID, message)
