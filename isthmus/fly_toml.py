"""A fly.toml as an app of isthmus: what of it can be honoured, and a note for all that cannot.

Decides what each key means here. Refuses to know nodes and files: text in, settings out. Invariant: every
key of the file is either in the app that is returned or named in a note.
"""

from __future__ import annotations

import re
import tomllib
from typing import Any, Final, NamedTuple, TypeVar

from isthmus.toml_lines import find_error_line, find_line
from routing.options import TLS_VERSIONS

T = TypeVar("T")

# As on Fly.
INTERNAL_PORT: Final = 8_080
SOFT_LIMIT: Final = 20
AUTOSTOP: Final = {True: "stop", False: "off", "stop": "stop", "off": "off", "suspend": "suspend"}
USUAL_PORTS: Final = (80, 443)
ALPN: Final = "http/1.1"
_UNITS_MS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000}

_NODE: Final = "a setting of the node, for all apps"
_NOT_BUILT: Final = "isthmus neither builds nor runs images: it routes to machines"
_DEPLOY: Final = "say it to `isthmus deploy`"
_ANY_PORT: Final = "what the first service with http says holds for all ports"
_BEFORE: Final = "run it before `isthmus deploy`"
# Why what is known of Fly's has no effect here, by its path without indices.
_REASONS: Final = {
    "build": _NOT_BUILT,
    "console_command": _NOT_BUILT,
    "deploy.max_unavailable": f"{_DEPLOY}: --max-unavailable",
    "deploy.release_command": _BEFORE,
    "deploy.release_command_timeout": _BEFORE,
    "deploy.release_command_vm": _BEFORE,
    "deploy.seed_command": _BEFORE,
    "deploy.strategy": f"{_DEPLOY}: --strategy",
    "deploy.wait_timeout": f"{_DEPLOY}: --timeout",
    "env": _NOT_BUILT,
    "experimental": _NOT_BUILT,
    "files": _NOT_BUILT,
    "host_dedication_id": _NOT_BUILT,
    "kill_signal": "processes get SIGTERM",
    "kill_timeout": "kill_timeout_ms of the machine in the node's configuration",
    "metrics": "each node has its own /metrics",
    "mounts": _NOT_BUILT,
    "processes": _NOT_BUILT,
    "restart": "restart of the machine in the node's configuration",
    "swap_size_mb": _NOT_BUILT,
    "vm": _NOT_BUILT,
    "*.force_https": _ANY_PORT,
    "*.force_instance_description": "not known here",
    "*.force_instance_key": "not known here",
    "*.h2_backend": "machines are spoken to in HTTP/1.1",
    "*.headers_read_timeout": f"proxy.head_timeout_ms is {_NODE}",
    "*.http_options": _ANY_PORT,
    "*.machine_checks": "there are no machines for tests only",
    "*.processes": "machines have no groups: an app has one kind",
    "*.proxy_proto_options": "the port has no handler `proxy_proto`",
    "*.tls_options": "the port has no handler `tls`",
}


class FlyTomlError(Exception):
    """The file makes no sense; the message says where."""


class Note(NamedTuple):
    """A key that has no effect, or another one than on Fly."""

    line: int | None
    key: str
    text: str


class FlyApp(NamedTuple):
    """What a file comes to: an app as `[[apps]]` has it, and notes in the order of lines."""

    app: dict[str, Any]
    notes: list[Note]


class _Table:
    """A table of the file. What nobody has taken is noted by `end`."""

    def __init__(self, fields: dict[str, Any], path: str, text: str, notes: list[Note]) -> None:
        self._fields = dict(fields)
        self._path = path
        self._text = text
        self._notes = notes

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def take(self, key: str, kind: type[T] | tuple[type[T], ...], usual: T) -> T:
        """Return a value that counts, or the usual one."""
        value = self._fields.pop(key, usual)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.wrong(key, f"must be {' or '.join(one.__name__ for one in kinds)}")
        return value

    def table(self, key: str) -> _Table:
        """Return a table in it, empty when there is none."""
        return _Table(self.take(key, dict, {}), self._join(key), self._text, self._notes)

    def tables(self, key: str) -> list[_Table]:
        """Return the tables of an array."""
        found = []
        for i, item in enumerate(self.take(key, list, [])):
            if not isinstance(item, dict):
                raise self.wrong(key, "must be tables: [[…]]")
            found.append(_Table(item, f"{self._join(key)}[{i}]", self._text, self._notes))
        return found

    def named(self) -> list[tuple[str, _Table]]:
        """Return all tables in it with their names."""
        return [(name, self.table(name)) for name in list(self._fields)]

    def take_ms(self, key: str) -> int | None:
        """Return a duration: `10s`, `1m30s`, or a number of milliseconds."""
        value: object = self._fields.pop(key, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if value is None:
            return None
        parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", str(value))
        if not parts or "".join(map("".join, parts)) != value:
            raise self.wrong(key, f"`{value}` is no duration such as 10s")
        return round(sum(float(number) * _UNITS_MS[unit] for number, unit in parts))

    def note(self, key: str, text: str) -> None:
        """Note what becomes of a key, or of the whole table."""
        path = self._join(key) if key else self._path
        line = find_line(self._text, path) or find_line(self._text, f"{path}[0]")
        self._notes.append(Note(line, path, text))

    def wrong(self, key: str, problem: str) -> FlyTomlError:
        """Return an error that names the place."""
        line = find_line(self._text, self._join(key))
        return FlyTomlError(f"{line or 1}: {self._join(key)}: {problem}")

    def end(self) -> None:
        """Note all that is left."""
        for key in self._fields:
            plain = re.sub(r"\[\d+\]", "", self._join(key))
            known = _REASONS.get(plain) or _REASONS.get(f"*.{key}")
            self.note(key, f"not honoured: {known or 'not known here'}")

    def _join(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key


def read_fly_toml(text: str, name: str = "") -> FlyApp:
    """Return the app that a fly.toml describes; `name` comes before that of the file. Raises FlyTomlError."""
    try:
        fields = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FlyTomlError(f"{find_error_line(text, error)}: {error}") from None
    notes: list[Note] = []
    root = _Table(fields, "", text, notes)
    found = root.take("app", str, "")
    if not (name or found):
        raise FlyTomlError("1: app: the file names none; say it with --app")
    app: dict[str, Any] = {"name": name or found, "hosts": [], "checks": [], "services": []}
    primary = root.take("primary_region", str, "")
    if primary:
        app["primary_region"] = primary
    if "http_service" in root:
        _read_http_service(root.table("http_service"), app)
    for service in root.tables("services"):
        _read_service(service, app)
    for static in root.tables("statics"):
        _read_static(static)
    for check_name, check in root.table("checks").named():
        check.note("type", "decides about requests here, as checks of services do")
        _read_check(check, app, check.take("type", str, "http"), check_name)
    root.table("deploy").end()
    root.end()
    if "internal_port" not in app and app["services"]:
        # Without HTTP all ports are as the first one.
        app |= {key: value for key, value in app["services"][0].items() if key != "port"}
    for key in ("services", "checks"):
        if not app[key]:
            del app[key]
    return FlyApp(app, sorted(notes, key=lambda note: note.line or 0))


def _read_http_service(service: _Table, app: dict[str, Any]) -> None:
    app["internal_port"] = service.take("internal_port", int, INTERNAL_PORT)
    app["force_https"] = service.take("force_https", bool, False)
    _read_scaling(service, app)
    _read_limits(service, app, counts_requests=True)
    _read_http_options(service.table("http_options"), app)
    _read_tls_options(service.table("tls_options"), app)
    for check in service.tables("checks"):
        _read_check(check, app, "http")
    service.end()


def _read_service(service: _Table, app: dict[str, Any]) -> None:
    """One of `[[services]]`: the first with HTTP is how the app is reached on all ports, others on theirs."""
    protocol = service.take("protocol", str, "tcp")
    if protocol != "tcp":
        service.note("", f"not honoured: isthmus carries no {protocol}")
        return
    said: dict[str, Any] = {"internal_port": service.take("internal_port", int, INTERNAL_PORT)}
    _read_scaling(service, app)
    ports = [(port, _read_handlers(port)) for port in service.tables("ports")]
    has_http = any("http" in handlers for _, handlers in ports)
    _read_limits(service, said, counts_requests=has_http)
    is_main = has_http and "internal_port" not in app
    if is_main:
        app.update(said)
    services = len(app["services"])
    for port, handlers in ports:
        _read_port(port, handlers, app, said, is_main=is_main and "http" in handlers)
    if not is_main and len(app["services"]) == services:
        service.note("", "not honoured but for its checks and auto_…: it names no port")
    for kind in ("tcp", "http"):
        for check in service.tables(f"{kind}_checks"):
            _read_check(check, app, kind, port=None if is_main else said["internal_port"])
    service.end()


def _read_handlers(port: _Table) -> list[str]:
    handlers = [str(handler) for handler in port.take("handlers", list, [])]
    for handler in handlers:
        if handler not in {"http", "edge_http", "tls", "proxy_proto"}:
            port.note("handlers", f"`{handler}` is not honoured")
    return ["http" if handler == "edge_http" else handler for handler in handlers]


def _read_port(
    port: _Table, handlers: list[str], app: dict[str, Any], said: dict[str, Any], *, is_main: bool
) -> None:
    """A port is a service of its own unless it is one of those that the app is reached on anyway."""
    number = port.take("port", int, 0)
    if not number:
        port.note("", "not honoured: ports are named one by one")
        return
    kept = [handler for handler in ("tls", "http") if handler in handlers]
    own: dict[str, Any] = app if is_main else {"port": number, **said, "handlers": kept}
    if "proxy_proto" in handlers:
        options = port.table("proxy_proto_options")
        own["proxy_protocol"] = options.take("version", str, "v1")
        options.end()
    if "tls" in handlers:
        _read_tls_options(port.table("tls_options"), own)
    if is_main:
        app["force_https"] = port.take("force_https", bool, False) or app.get("force_https", False)
        _read_http_options(port.table("http_options"), app)
        if number not in USUAL_PORTS:
            port.note("port", "reached on all ports on which nodes serve HTTP")
    else:
        app["services"].append(own)
        port.note("port", f'reached where nodes listen on it: [[tcp]] with app = "{app["name"]}"')
    port.end()


def _read_scaling(service: _Table, app: dict[str, Any]) -> None:
    stop: object = service.take("auto_stop_machines", (str, bool), False)
    if stop not in AUTOSTOP:
        raise service.wrong("auto_stop_machines", f"`{stop}` is none of off, stop, suspend")
    said = {
        "autostop": AUTOSTOP[stop],
        "autostart": service.take("auto_start_machines", bool, True),
        "min_machines_running": service.take("min_machines_running", int, 0),
    }
    usual = {"autostop": "off", "autostart": True, "min_machines_running": 0}
    app |= {key: value for key, value in said.items() if value != usual[key]}


def _read_limits(service: _Table, said: dict[str, Any], *, counts_requests: bool) -> None:
    limits = service.table("concurrency")
    if "type" in limits:
        counted = "requests" if counts_requests else "connections"
        if limits.take("type", str, counted) != counted:
            limits.note("type", f"{counted} are counted")
    hard = limits.take("hard_limit", int, 0)
    soft = limits.take("soft_limit", int, min(SOFT_LIMIT, hard) if hard else SOFT_LIMIT)
    said["soft_limit"] = soft
    if hard:
        said["hard_limit"] = hard
    limits.end()


def _read_http_options(options: _Table, app: dict[str, Any]) -> None:
    if options.take("compress", bool, False):
        app["compression"] = True
    if "idle_timeout" in options:
        options.take("idle_timeout", int, 0)
        options.note("idle_timeout", f"not honoured: proxy.stream_timeout_ms is {_NODE}")
    response = options.table("response")
    headers = response.take("headers", dict, {})
    if headers:
        app["response_headers"] = headers
    if response.take("pristine", bool, False):
        app["pristine"] = True
    response.end()
    remembered = []
    for cache in options.tables("replay_cache"):
        kinds: dict[str, type] = {"path_prefix": str, "type": str, "name": str, "ttl_seconds": int}
        kinds["allow_bypass"] = bool
        remembered.append({key: cache.take(key, kind, None) for key, kind in kinds.items() if key in cache})
        cache.end()
    if remembered:
        app["replay_cache"] = remembered
    options.end()


def _read_tls_options(options: _Table, own: dict[str, Any]) -> None:
    """What of it holds for the app or service in `own`."""
    alpn = [str(protocol) for protocol in options.take("alpn", list, [ALPN])]
    others = ", ".join(protocol for protocol in alpn if protocol != ALPN)
    if others and ALPN in alpn:
        options.note("alpn", f"not honoured: {others}; clients get {ALPN}")
    elif others:
        options.note("alpn", f"not honoured: {others}; clients get {ALPN}, or agree on nothing")
    said = [str(version) for version in options.take("versions", list, [])]
    known = sorted(TLS_VERSIONS.intersection(said))
    if known and len(known) < len(TLS_VERSIONS):
        own["tls_versions"] = known
    unknown = ", ".join(version for version in said if version not in TLS_VERSIONS)
    if unknown:
        options.note("versions", f"not honoured: {unknown}")
    if options.take("default_self_signed", bool, False):
        why = "who asks for a name without a certificate is refused, or gets the node's default"
        options.note("default_self_signed", f"not honoured: {why}")
    options.end()


def _read_static(static: _Table) -> None:
    """One of `[[statics]]`. On Fly a server inside the machine has the files; the proxy never sees them."""
    keys = ("url_prefix", "guest_path", "tigris_bucket", "index_document")
    for key in keys[:2]:
        if key not in static:
            raise static.wrong(key, "is missing")
    said = [f"{key} {static.take(key, str, '')}" for key in keys if key in static]
    static.note("", f"not honoured: {', '.join(said)}: files inside of a machine are the app's to serve")
    static.end()


def _read_check(
    check: _Table, app: dict[str, Any], kind: str, name: str = "", port: int | None = None
) -> None:
    if kind not in {"tcp", "http"}:
        raise check.wrong("type", f"`{kind}` is neither tcp nor http")
    said: dict[str, Any] = {"type": kind}
    port = check.take("port", int, port or 0)
    said |= {key: value for key, value in (("name", name), ("port", port)) if value}
    for key, ours in (("grace_period", "grace_ms"), ("interval", "interval_ms"), ("timeout", "timeout_ms")):
        value = check.take_ms(key)
        if value is not None:
            said[ours] = value
    if kind == "http":
        method = check.take("method", str, "GET").upper()
        if method in {"GET", "HEAD", "OPTIONS"}:
            said["method"] = method
        else:
            check.note("method", f"not honoured: a check must change nothing, and {method} may; GET is sent")
        said["path"] = check.take("path", str, "/")
        headers = check.take("headers", dict, {})
        if headers:
            said["headers"] = {key: str(value) for key, value in headers.items()}
        if check.take("protocol", str, "http") != "http":
            check.note("protocol", "not honoured: machine_tls of the app says whether machines speak TLS")
        for key in ("tls_skip_verify", "tls_server_name"):
            if key in check:
                check.take(key, (str, bool), "")
                check.note(key, "not honoured: machine_tls of the app says it")
    check.end()
    app["checks"].append(said)
