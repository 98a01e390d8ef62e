"""The configuration of one node: what may be set, what it defaults to, and where a wrong value came from.

Decides the names and meaning of every setting and merges, weakest first: defaults, the TOML file, the
environment, flags. Knows nothing of processes. Invariant: a `Config` that exists is valid; whatever is
wrong is refused with the file and line, variable or flag that said it.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import ipaddress
import os
import re
import socket
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from isthmus.toml_lines import find_line
from replication.core.wire import CLUSTER_CHARS_MAX
from replication.seal import KEYS_MAX
from routing import geo
from routing.catalog import (
    APP_NAME,
    IDENTIFIER,
    REGION_CODE,
    canonical_hostname,
    canonical_prefix,
    parse_address,
)
from routing.machine_tls import parse_machine_tls
from routing.options import PAGE_CHARS_MAX, parse_headers

T = TypeVar("T")
# Numbers end up in SQLite's integers and in timers; beyond this is a mistake.
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
NotNegative = Annotated[int, Meta(ge=0, le=2**31 - 1)]
DAY_MS = 86_400_000


# A region for a node that is told nothing: a place of its own, equally far from everywhere.
LOCAL_REGION = "local"

ENVIRONMENT_PREFIX = "ISTHMUS_"

# Read before there is a configuration.
_NOT_SETTINGS = frozenset({"ISTHMUS_ADMIN", "ISTHMUS_COMPILED", "ISTHMUS_CONFIG", "ISTHMUS_TOKEN"})

# The flags that are not simply called as their setting.
_FLAGS: Mapping[str, str] = {
    "proxy.listen": "--listen",
    "gossip.advertise": "--advertise",
    "gossip.join": "--join",
    "apps": "--app",
    "apps.hosts": "--host",
    "apps.machines": "--machine",
    "apps.checks": "--check",
}


class ConfigError(Exception):
    """A setting is wrong. The message says which, where it was said, and what would be right."""


class _ValueOfKeyError(ValueError):
    """The value of one key of a section is wrong; `key` is a path below that section."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(problem)
        self.key = key


def _check(key: str, parse: Callable[[str], object], *values: str) -> None:
    """Raise an error that names the key unless `parse` takes each of its values."""
    for value in values:
        try:
            parse(value)
        except ValueError as error:
            raise _ValueOfKeyError(key, str(error)) from None


def parse_listen(text: str) -> tuple[str, int]:
    """Split `host:port` or `[v6]:port`; port 0 lets the system choose. Raises ValueError."""
    match = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\]:(\d{1,5})|([^\s:\[\]/@]+):(\d{1,5})", text)
    if match is None:
        raise ValueError(f"`{text}` is not an address of the form host:port or [v6]:port")
    host, port = (match[1], match[2]) if match[1] is not None else (match[3], match[4])
    if int(port) > 65535:
        raise ValueError(f"`{text}` has a port above 65535")
    return host, int(port)


def _parse_peer(text: str) -> None:
    """Raise ValueError unless others can connect to the address: it needs a port of its own."""
    if parse_listen(text)[1] == 0:
        raise ValueError(f"`{text}` has port 0, to which nobody can connect")


def _parse_machine(text: str) -> None:
    """Raise ValueError unless routing takes the address, and it names a port."""
    parse_listen(text)
    parse_address(text)


def format_address(host: str, port: int) -> str:
    """Join a host and a port; an IPv6 address gets its brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """True when nothing outside this machine can reach a listener on the host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_wildcard(host: str) -> bool:
    """True when a listener on the host takes connections to all addresses of this machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def check_app_name(name: str) -> None:
    """Raise ValueError unless routing takes the name for an app."""
    if APP_NAME.fullmatch(name) is None:
        raise ValueError(f"`{name}` is no name for an app: up to 63 of a-z, 0-9, - and _")


def check_identifier(name: str, what: str) -> None:
    """Raise ValueError unless routing takes the name for a node or a machine."""
    if IDENTIFIER.fullmatch(name) is None:
        raise ValueError(f"`{name}` is no name for {what}: up to 64 letters, digits and . - _")


class _Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file: unknown keys are refused, values are fixed once read."""


class ProxyConfig(_Section, frozen=True):
    """`[proxy]`: the listener that clients reach. `proxy/settings.py` has the reason of each default."""

    listen: str = "127.0.0.1:8080"
    trusted_proxies: tuple[str, ...] = ()
    proxy_protocol_from: tuple[str, ...] = ()
    machine_networks: tuple[str, ...] = ()
    client_routing: bool = True
    head_bytes_max: Positive = 32_768
    header_count_max: Positive = 100
    url_bytes_max: Positive = 8_192
    connections_max: Positive = 32_768
    connections_per_client_max: Positive = 1_024
    requests_per_connection_max: Positive = 10_000
    memory_bytes_max: Annotated[int, Meta(ge=0, le=2**53)] = 0
    replay_body_bytes_max: Positive = 1_048_576
    replays_max: Positive = 10
    attempts_max: Positive = 6
    queue_max: Positive = 1_024
    queue_timeout_ms: Positive = 5_000
    connect_timeout_ms: Positive = 3_000
    head_timeout_ms: Positive = 15_000
    keepalive_timeout_ms: Positive = 75_000
    body_timeout_ms: Positive = 30_000
    body_bytes_per_s_min: Positive = 256
    send_timeout_ms: Positive = 30_000
    response_timeout_ms: Positive = 60_000
    stream_timeout_ms: Positive = 300_000
    tunnel_timeout_ms: Positive = 3_600_000
    drain_ms: Positive = 10_000

    def __post_init__(self) -> None:
        _check("listen", parse_listen, self.listen)
        _check("trusted_proxies", ipaddress.ip_network, *self.trusted_proxies)
        _check("proxy_protocol_from", ipaddress.ip_network, *self.proxy_protocol_from)
        _check("machine_networks", ipaddress.ip_network, *self.machine_networks)


class TlsConfig(_Section, frozen=True):
    """`[tls]`: the listener that clients reach over TLS."""

    listen: str = ""
    certificates: tuple[str, ...] = ()
    handshakes_max: Positive = 1_024
    handshake_timeout_ms: Positive = 10_000
    client_certificate: str = ""

    def __post_init__(self) -> None:
        if self.listen:
            _check("listen", parse_listen, self.listen)
            if not self.certificates:
                raise _ValueOfKeyError("certificates", "the listener for TLS needs at least one")


class AdminConfig(_Section, frozen=True):
    """`[admin]`: JSON API, metrics and dashboard."""

    listen: str = "127.0.0.1:8471"
    token: str = ""

    def __post_init__(self) -> None:
        _check("listen", parse_listen, self.listen)
        if not self.token and not is_loopback(parse_listen(self.listen)[0]):
            raise _ValueOfKeyError(
                "listen", f"{self.listen} is open to others: set admin.token, or listen on 127.0.0.1"
            )


class GossipConfig(_Section, frozen=True):
    """`[gossip]`: how this node finds and talks to the others."""

    listen: str = "127.0.0.1:8472"
    advertise: str = ""
    join: tuple[str, ...] = ()
    cluster: Annotated[str, Meta(min_length=1, max_length=CLUSTER_CHARS_MAX)] = "isthmus"
    keys: Annotated[tuple[str, ...], Meta(max_length=KEYS_MAX)] = ()
    keys_file: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""

    def __post_init__(self) -> None:
        _check("listen", parse_listen, self.listen)
        if self.advertise:
            _check("advertise", _parse_peer, self.advertise)
        _check("join", _parse_peer, *self.join)
        _check("keys", decode_key, *self.keys)
        if self.keys and self.keys_file:
            raise _ValueOfKeyError("keys_file", "gossip.keys is set as well; keep one of the two")
        host, _ = parse_listen(self.listen)
        if not self.sealed:
            self._check_unsealed(host)
        for key in ("tls_cert", "tls_key", "tls_ca"):
            if not getattr(self, key) and (self.tls_cert or self.tls_key or self.tls_ca):
                raise _ValueOfKeyError(key, "tls_cert, tls_key and tls_ca go together")
        if not self.advertise and is_wildcard(host):
            raise _ValueOfKeyError(
                "listen",
                f"{self.listen} is no address that others could be told: set gossip.advertise to one",
            )

    def _check_unsealed(self, host: str) -> None:
        """Raise unless all gossip stays on this machine; TLS does not help, as datagrams have none."""
        if not is_loopback(host):
            raise _ValueOfKeyError(
                "listen",
                f"{self.listen} is open to others: set gossip.keys (`isthmus key` makes one), "
                "or listen on 127.0.0.1",
            )
        if self.advertise and not is_loopback(parse_listen(self.advertise)[0]):
            raise _ValueOfKeyError(
                "advertise",
                f"{self.advertise} is where others are: set gossip.keys (`isthmus key` makes one)",
            )

    @property
    def sealed(self) -> bool:
        """True when gossip is sealed with a cluster key."""
        return bool(self.keys or self.keys_file)

    def decoded_keys(self) -> tuple[bytes, ...]:
        """Return the keys that the configuration itself holds as 32 bytes each, the sealing one first."""
        return tuple(decode_key(key) for key in self.keys)


def decode_key(text: str) -> bytes:
    """Return the 32 bytes of a cluster key in base64; raises ValueError."""
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 32:
        raise ValueError("a gossip key is 32 bytes in base64; make one with `isthmus key`")
    return key


class ReplicationConfig(_Section, frozen=True):
    """`[replication]`: how much may be written here, and how much of one other node is taken in at once."""

    writes_per_s: NotNegative = 0
    table_writes_per_s: dict[str, NotNegative] = {}
    origin_changesets_per_s: NotNegative = 2_000
    origin_bytes_per_s: NotNegative = 16_777_216


class RegionConfig(_Section, frozen=True):
    """`[regions.<code>]`: a region of your own."""

    latitude: Annotated[float, Meta(ge=-90, le=90)]
    longitude: Annotated[float, Meta(ge=-180, le=180)]
    name: str = ""


class CheckConfig(_Section, frozen=True):
    """`[[apps.checks]]`: a probe of each of the app's machines, run by the node that owns the machine."""

    type: Literal["http", "tcp"] = "http"
    name: str = ""
    path: str = "/"
    method: Literal["GET", "HEAD", "OPTIONS"] = "GET"
    interval_ms: Annotated[int, Meta(ge=100, le=DAY_MS)] = 5_000
    timeout_ms: Annotated[int, Meta(ge=1, le=DAY_MS)] = 2_000
    grace_ms: Annotated[int, Meta(ge=0, le=DAY_MS)] = 0

    def __post_init__(self) -> None:
        if re.fullmatch(r"/[\x21-\x7e]*", self.path) is None:
            raise _ValueOfKeyError("path", f"`{self.path}` must start with / and hold no spaces")


class MachineConfig(_Section, frozen=True):
    """`[[apps.machines]]`: one instance of the app, owned and checked by this node."""

    address: str
    id: str = ""
    region: str = ""

    def __post_init__(self) -> None:
        _check("address", _parse_machine, self.address)
        if self.id:
            _check("id", lambda name: check_identifier(name, "a machine"), self.id)


class MachineTlsConfig(_Section, frozen=True):
    """`[apps.machine_tls]`: how machines are spoken to over TLS."""

    server_name: str = ""
    ca: str = ""
    fingerprint: str = ""
    verify: bool = True

    def __post_init__(self) -> None:
        try:
            parse_machine_tls(msgspec.structs.asdict(self))
        except ValueError as error:
            raise _ValueOfKeyError(re.findall(r"machine_tls\.(\w+)", str(error))[0], str(error)) from None


class AppConfig(_Section, frozen=True):
    """`[[apps]]`: something served through this node's part of the table."""

    name: str
    hosts: tuple[str, ...] = ("*",)
    path_prefix: str = "/"
    soft_limit: Positive = 20
    hard_limit: Positive | None = None
    machines: tuple[MachineConfig, ...] = ()
    checks: tuple[CheckConfig, ...] = ()
    proxy_protocol: Literal["", "v1", "v2"] = ""
    response_headers: dict[str, bool | str | tuple[str, ...]] = {}
    maintenance: Annotated[str, Meta(max_length=PAGE_CHARS_MAX)] = ""
    force_https: bool = False
    machine_tls: MachineTlsConfig | bool = False

    def __post_init__(self) -> None:
        _check("name", check_app_name, self.name)
        _check("hosts", check_hostname, *self.hosts)
        _check("path_prefix", canonical_prefix, self.path_prefix)
        if self.hard_limit is not None and self.hard_limit < self.soft_limit:
            raise _ValueOfKeyError("hard_limit", f"{self.hard_limit} is below soft_limit {self.soft_limit}")
        try:
            parse_headers(self.response_headers)
        except ValueError as error:
            raise _ValueOfKeyError("response_headers", str(error)) from None
        names = [check.name for check in self.checks if check.name]
        for i, name in _repeated(names):
            raise _ValueOfKeyError(f"checks[{i}].name", f"check `{name}` is declared twice")


def _repeated(items: Sequence[T]) -> Iterator[tuple[int, T]]:
    """Yield position and value of what an earlier item says already."""
    return ((i, item) for i, item in enumerate(items) if item in items[:i])


def check_hostname(host: str) -> None:
    """Raise ValueError unless routing takes the name: a host name, `*.suffix` or `*`."""
    try:
        canonical_hostname(host)
    except ValueError:
        raise ValueError(f"`{host}` is not a host name, `*.suffix` or `*`") from None


class LogConfig(_Section, frozen=True):
    """`[log]`: what is written to standard error."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class AccessLogConfig(_Section, frozen=True):
    """`[access_log]`: a line for each request."""

    file: str = ""
    format: Literal["json", "combined"] = "json"
    one_in: Positive = 1


class Config(_Section, frozen=True):
    """Everything that one node is told."""

    node: str
    data: str
    region: str = LOCAL_REGION
    workers: Annotated[int, Meta(ge=0, le=256)] = 1
    synchronous: Literal["normal", "full"] = "normal"
    proxy: ProxyConfig = ProxyConfig()
    tls: TlsConfig = TlsConfig()
    admin: AdminConfig = AdminConfig()
    gossip: GossipConfig = GossipConfig()
    replication: ReplicationConfig = ReplicationConfig()
    log: LogConfig = LogConfig()
    access_log: AccessLogConfig = AccessLogConfig()
    regions: dict[str, RegionConfig] = {}
    apps: tuple[AppConfig, ...] = ()

    def __post_init__(self) -> None:
        _check("node", lambda name: check_identifier(name, "a node"), self.node)
        if not self.data or "\0" in self.data:
            raise _ValueOfKeyError("data", "the data directory needs a name without NUL")
        for code in self.regions:
            if REGION_CODE.fullmatch(code) is None or code in geo.AREAS:
                raise _ValueOfKeyError(f"regions.{code}", f"`{code}` is no code for a region: a-z, 0-9 and -")
        self._check_listeners()
        self._check_apps()

    def _check_listeners(self) -> None:
        taken: dict[tuple[str, int], str] = {}
        for section in ("proxy", "tls", "admin", "gossip"):
            if not getattr(self, section).listen:
                continue
            address = parse_listen(getattr(self, section).listen)
            other = taken.setdefault(address, section)
            if other != section and address[1]:
                problem = f"{format_address(*address)} is {other}.listen as well; choose another port"
                raise _ValueOfKeyError(f"{section}.listen", problem)

    def _check_apps(self) -> None:
        for i, name in _repeated([app.name for app in self.apps]):
            raise _ValueOfKeyError(f"apps[{i}].name", f"app `{name}` is declared twice")
        routes: dict[tuple[str, str], str] = {}
        machines: set[str] = set()
        for i, app in enumerate(self.apps):
            for host in app.hosts:
                route = (canonical_hostname(host), canonical_prefix(app.path_prefix))
                if routes.setdefault(route, app.name) != app.name:
                    problem = f"host `{host}` at {app.path_prefix} already leads to app `{routes[route]}`"
                    raise _ValueOfKeyError(f"apps[{i}].hosts", problem)
            for j, machine in enumerate(app.machines):
                if machine.id in machines:
                    problem = f"machine `{machine.id}` is declared twice"
                    raise _ValueOfKeyError(f"apps[{i}].machines[{j}].id", problem)
                machines.update({machine.id} - {""})

    @property
    def database(self) -> Path:
        """The SQLite file that holds the routing table."""
        return Path(self.data) / "isthmus.db"

    @property
    def feed_socket(self) -> Path:
        """The Unix socket on which workers follow the agent."""
        return Path(self.data) / "feed.sock"


def default_data_dir(environ: Mapping[str, str]) -> Path:
    """Return where state goes when nothing is said: /var/lib for root, the XDG state directory otherwise."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/var/lib/isthmus")
    base = environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "isthmus"


def load_config(
    file: Path | None, flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ
) -> Config:
    """Merge defaults, file, environment and flags into a valid Config.

    Keys of `flags` are dotted names (`gossip.listen`); values of None were not given. Raises ConfigError.
    """
    text = ""
    merged: dict[str, Any] = {}
    if file is not None:
        text, merged = _read_toml(file)
    origins: dict[str, str] = {}
    for name, (value, origin) in _platform_defaults(environ).items():
        if _get(merged, name) is None:
            _set(merged, name, value)
            origins[name] = origin
    for name, variable, value in _read_environment(environ):
        _set(merged, name, value)
        origins[name] = f"environment variable {variable}"
    for name, value in flags.items():
        if value is not None:
            _set(merged, name, value)
            origins[name] = f"flag {flag_name(name)}"
    try:
        config = msgspec.convert(merged, Config)
        _check_regions(config)
    except msgspec.ValidationError as error:
        raise ConfigError(_describe(error, merged, file, text, origins)) from None
    return config


def _read_toml(file: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: {error}") from None


def _platform_defaults(environ: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    """What a Fly Machine says of itself, else what this host does; each with where that was found."""
    defaults: dict[str, tuple[Any, str]] = {
        "node": (_hostname(), "the name of this host"),
        "data": (str(default_data_dir(environ)), "the default"),
    }
    # On Fly the nodes of one app find each other by its name in the private network's DNS.
    gossip_port = parse_listen(GossipConfig().listen)[1]
    for name, variable, form in (
        ("node", "FLY_MACHINE_ID", "{}"),
        ("region", "FLY_REGION", "{}"),
        ("gossip.listen", "FLY_PRIVATE_IP", f"[{{}}]:{gossip_port}"),
        ("gossip.join", "FLY_APP_NAME", f"{{}}.internal:{gossip_port}"),
    ):
        if environ.get(variable):
            value: Any = form.format(environ[variable])
            defaults[name] = ([value] if name == "gossip.join" else value, f"environment variable {variable}")
    return defaults


def _hostname() -> str:
    name = re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname().split(".")[0])
    return name[:63].strip("-") or "node"


def _read_environment(environ: Mapping[str, str]) -> list[tuple[str, str, Any]]:
    """Return (dotted name, variable, value) of each ISTHMUS_ variable; `__` separates section and key."""
    found = []
    for variable, raw in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in _NOT_SETTINGS:
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
        kind = setting_types().get(name)
        if kind is None:
            close = difflib.get_close_matches(name, setting_types(), 1)
            hint = f"; did you mean {variable_name(close[0])}?" if close else ""
            raise ConfigError(f"environment variable {variable} is no setting{hint}")
        found.append((name, variable, _parse_variable(kind, raw)))
    return found


def _parse_variable(kind: Any, raw: str) -> Any:
    """Return the value that a variable's text stands for; text that stands for none is refused later."""
    if typing.get_origin(kind) is tuple:
        return [part.strip() for part in raw.split(",") if part.strip()]
    if typing.get_origin(kind) is dict:
        pairs = [part.partition("=") for part in raw.split(",") if part.strip()]
        return {name.strip(): _parse_variable(int, value.strip()) for name, _, value in pairs}
    if kind is bool:
        return {"true": True, "false": False}.get(raw.lower(), raw)
    if kind is int and re.fullmatch(r"-?[0-9]{1,18}", raw):
        return int(raw)
    return raw


def flag_name(setting: str) -> str:
    """Return the flag of `isthmus run` that gives a dotted setting, or the part of an app."""
    flag = _FLAGS.get(setting)
    if flag is None and setting.startswith("apps."):
        return flag_name(setting.rpartition(".")[0])
    return flag or f"--{setting.replace('.', '-').replace('_', '-')}"


def variable_name(setting: str) -> str:
    """Return the environment variable of a dotted setting."""
    return ENVIRONMENT_PREFIX + setting.upper().replace(".", "__")


def setting_types() -> dict[str, Any]:
    """Return the type of each setting that the environment can give, by dotted name."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(Config).items():
        if isinstance(kind, type) and issubclass(kind, Struct):
            found.update({f"{name}.{key}": value for key, value in typing.get_type_hints(kind).items()})
        elif name not in ("regions", "apps"):
            found[name] = kind
    return found


def _get(tree: Mapping[str, Any], name: str) -> Any:
    node: Any = tree
    for part in name.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
    *sections, key = name.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            return  # the file gave something else here: the type check says so
        tree = child
    tree[key] = value


def _check_regions(config: Config) -> None:
    """Raise ValidationError with a path when a region code means no known place."""
    own = {LOCAL_REGION, *config.regions}
    named = [("$.region", config.region)]
    for i, app in enumerate(config.apps):
        named += [
            (f"$.apps[{i}].machines[{j}].region", m.region) for j, m in enumerate(app.machines) if m.region
        ]
    for path, code in named:
        problem = unknown_region(code, own)
        if problem:
            raise msgspec.ValidationError(f"{problem} - at `{path}`")


def unknown_region(code: str, own: typing.Collection[str]) -> str | None:
    """Say what is wrong with a region code, or None: it is built in or one of `own`."""
    if code in own or code in geo.BUILT_IN:
        return None
    close = difflib.get_close_matches(code, [*own, *geo.BUILT_IN], 1)
    hint = f"did you mean `{close[0]}`?" if close else f"give it coordinates under [regions.{code}]"
    return f"unknown region `{code}`; {hint}"


def _describe(
    error: msgspec.ValidationError,
    merged: Mapping[str, Any],
    file: Path | None,
    text: str,
    origins: Mapping[str, str],
) -> str:
    """Turn a validation error with a JSON path into a sentence that names its source."""
    problem, _, where = str(error).partition(" - at `")
    path = _name_region(where.rstrip("`").removeprefix("$").strip("."), merged)
    unknown = re.search(r"unknown field `([^`]+)`", problem)
    if unknown is not None:
        path = f"{path}.{unknown[1]}".strip(".")
        hint = _suggest_key(path)
        problem = f"unknown key `{path}`" + (f", did you mean `{hint}`?" if hint else "")
    else:
        if isinstance(error.__cause__, _ValueOfKeyError):
            path = f"{path}.{error.__cause__.key}".strip(".")
        problem = f"{path}: {problem[:1].lower()}{problem[1:]}"
    for name, origin in origins.items():
        if path == name or path.startswith((f"{name}[", f"{name}.")):
            source = f"flag {flag_name(_without_indices(path))}" if origin.startswith("flag ") else origin
            return f"{source}: {problem}"
    if file is None:
        return problem
    line = find_line(text, path)
    return f"{file}:{line}: {problem}" if line else f"{file}: {problem}"


def _name_region(path: str, merged: Mapping[str, Any]) -> str:
    """Put the code of the wrong region where the path, as msgspec tells it, has dots."""
    if path.startswith("regions[...]"):
        for code, value in merged["regions"].items():
            try:
                msgspec.convert(value, RegionConfig)
            except msgspec.ValidationError:
                return path.replace("[...]", f".{code}", 1)
    return path


def _without_indices(path: str) -> str:
    return re.sub(r"\[\d+\]", "", path)


def _suggest_key(path: str) -> str | None:
    known = [*setting_types(), "regions", "apps"]
    for prefix, struct in (
        ("apps", AppConfig),
        ("apps.machines", MachineConfig),
        ("apps.checks", CheckConfig),
        ("apps.machine_tls", MachineTlsConfig),
        ("regions.*", RegionConfig),
    ):
        known += [f"{prefix}.{key}" for key in struct.__struct_fields__]
    plain = re.sub(r"^regions\.[^.]+", "regions.*", _without_indices(path))
    close: Sequence[str] = difflib.get_close_matches(plain, known, 1, 0.75)
    return close[0] if close else None
