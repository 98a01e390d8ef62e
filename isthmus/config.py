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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from isthmus.toml_lines import find_line
from routing import geo
from routing.catalog import APP_NAME, IDENTIFIER

Positive = Annotated[int, Meta(ge=1)]


# A region for a node that is told nothing: a place of its own, equally far from everywhere.
LOCAL_REGION = "local"

ENVIRONMENT_PREFIX = "ISTHMUS_"


class ConfigError(Exception):
    """A setting is wrong. The message says which, where it was said, and what would be right."""


def parse_listen(text: str) -> tuple[str, int]:
    """Split `host:port` or `[v6]:port`; port 0 lets the system choose. Raises ValueError."""
    match = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\]:(\d{1,5})|([^\s:\[\]/@]+):(\d{1,5})", text)
    if match is None:
        raise ValueError(f"`{text}` is not an address of the form host:port or [v6]:port")
    host, port = (match[1], match[2]) if match[1] is not None else (match[3], match[4])
    if int(port) > 65535:
        raise ValueError(f"`{text}` has a port above 65535")
    return host, int(port)


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
    machine_networks: tuple[str, ...] = ()
    client_routing: bool = True
    head_bytes_max: Positive = 32_768
    header_count_max: Positive = 100
    url_bytes_max: Positive = 8_192
    replay_body_bytes_max: Positive = 1_048_576
    replays_max: Positive = 10
    attempts_max: Positive = 6
    connect_timeout_ms: Positive = 3_000
    head_timeout_ms: Positive = 15_000
    keepalive_timeout_ms: Positive = 75_000
    body_timeout_ms: Positive = 30_000
    send_timeout_ms: Positive = 30_000
    response_timeout_ms: Positive = 60_000
    stream_timeout_ms: Positive = 300_000
    tunnel_timeout_ms: Positive = 3_600_000
    drain_ms: Positive = 10_000

    def __post_init__(self) -> None:
        parse_listen(self.listen)
        for network in (*self.trusted_proxies, *self.machine_networks):
            ipaddress.ip_network(network)


class AdminConfig(_Section, frozen=True):
    """`[admin]`: JSON API, metrics and dashboard."""

    listen: str = "127.0.0.1:8471"
    token: str = ""

    def __post_init__(self) -> None:
        host, _ = parse_listen(self.listen)
        if not self.token and not is_loopback(host):
            raise ValueError(
                f"admin.listen {self.listen} is open to others: set admin.token, or listen on 127.0.0.1"
            )


class GossipConfig(_Section, frozen=True):
    """`[gossip]`: how this node finds and talks to the others."""

    listen: str = "127.0.0.1:8472"
    advertise: str = ""
    join: tuple[str, ...] = ()
    cluster: str = "isthmus"
    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        host, _ = parse_listen(self.listen)
        if self.advertise:
            parse_listen(self.advertise)
        for address in self.join:
            parse_listen(address)
        self.decoded_keys()
        if not self.keys and not is_loopback(host):
            raise ValueError(
                f"gossip.listen {self.listen} is open to others: set gossip.keys "
                "(`isthmus key` makes one), or listen on 127.0.0.1"
            )

    def decoded_keys(self) -> tuple[bytes, ...]:
        """Return the cluster keys as 32 bytes each, the sealing one first."""
        return tuple(_decode_key(key) for key in self.keys)


def _decode_key(text: str) -> bytes:
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 32:
        raise ValueError("a gossip key is 32 bytes in base64; make one with `isthmus key`")
    return key


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
    interval_ms: Annotated[int, Meta(ge=100)] = 5_000
    timeout_ms: Positive = 2_000
    grace_ms: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        if re.fullmatch(r"/[\x21-\x7e]*", self.path) is None:
            raise ValueError(f"check path `{self.path}` must start with / and hold no spaces")


class MachineConfig(_Section, frozen=True):
    """`[[apps.machines]]`: one instance of the app, owned and checked by this node."""

    address: str
    id: str = ""
    region: str = ""

    def __post_init__(self) -> None:
        parse_listen(self.address)
        if self.id:
            check_identifier(self.id, "a machine")


class AppConfig(_Section, frozen=True):
    """`[[apps]]`: something served through this node's part of the table."""

    name: str
    hosts: tuple[str, ...] = ("*",)
    path_prefix: str = "/"
    soft_limit: Positive = 20
    hard_limit: Positive | None = None
    machines: tuple[MachineConfig, ...] = ()
    checks: tuple[CheckConfig, ...] = ()

    def __post_init__(self) -> None:
        check_app_name(self.name)
        for host in self.hosts:
            check_hostname(host)
        if not self.path_prefix.startswith("/"):
            raise ValueError(f"path_prefix `{self.path_prefix}` must start with /")
        if self.hard_limit is not None and self.hard_limit < self.soft_limit:
            raise ValueError(f"hard_limit {self.hard_limit} is below soft_limit {self.soft_limit}")


def check_hostname(host: str) -> None:
    """Raise ValueError unless it is a host name, `*.suffix` or `*`."""
    label = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
    if host != "*" and (
        len(host) > 253 or re.fullmatch(rf"(\*\.)?{label}(\.{label})*", host.lower()) is None
    ):
        raise ValueError(f"`{host}` is not a host name, `*.suffix` or `*`")


class LogConfig(_Section, frozen=True):
    """`[log]`: what is written to standard error."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(_Section, frozen=True):
    """Everything that one node is told."""

    node: str
    data: str
    region: str = LOCAL_REGION
    workers: Annotated[int, Meta(ge=0, le=256)] = 1
    proxy: ProxyConfig = ProxyConfig()
    admin: AdminConfig = AdminConfig()
    gossip: GossipConfig = GossipConfig()
    log: LogConfig = LogConfig()
    regions: dict[str, RegionConfig] = {}
    apps: tuple[AppConfig, ...] = ()

    def __post_init__(self) -> None:
        check_identifier(self.node, "a node")
        names = [app.name for app in self.apps]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"app `{name}` is declared twice")

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
    for name, value in _platform_defaults(environ).items():
        if _get(merged, name) is None:
            _set(merged, name, value)
    for name, variable, value in _read_environment(environ):
        _set(merged, name, value)
        origins[name] = f"environment variable {variable}"
    for name, value in flags.items():
        if value is not None:
            _set(merged, name, value)
            origins[name] = f"flag --{name.replace('.', '-').replace('_', '-')}"
    try:
        config = msgspec.convert(merged, Config)
        _check_regions(config)
    except msgspec.ValidationError as error:
        raise ConfigError(_describe(str(error), file, text, origins)) from None
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


def _platform_defaults(environ: Mapping[str, str]) -> dict[str, Any]:
    """What a Fly Machine says of itself, else what this host does."""
    defaults: dict[str, Any] = {
        "node": environ.get("FLY_MACHINE_ID") or _hostname(),
        "data": str(default_data_dir(environ)),
    }
    if environ.get("FLY_REGION"):
        defaults["region"] = environ["FLY_REGION"]
    return defaults


def _hostname() -> str:
    name = re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname().split(".")[0]).strip("-")
    return name[:63] or "node"


def _read_environment(environ: Mapping[str, str]) -> list[tuple[str, str, Any]]:
    """Return (dotted name, variable, value) of each ISTHMUS_ variable; `__` separates section and key."""
    found = []
    for variable, raw in environ.items():
        # Three are read by the command line itself, before there is a configuration.
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in (
            "ISTHMUS_ADMIN",
            "ISTHMUS_CONFIG",
            "ISTHMUS_TOKEN",
        ):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
        kind = setting_types().get(name)
        if kind is None:
            close = difflib.get_close_matches(name, setting_types(), 1)
            hint = f"; did you mean {variable_name(close[0])}?" if close else ""
            raise ConfigError(f"environment variable {variable} is no setting{hint}")
        value: Any = raw
        if typing.get_origin(kind) is tuple:
            value = [part.strip() for part in raw.split(",") if part.strip()]
        elif raw.lstrip("-").isdigit() and kind is not str:
            value = int(raw)
        found.append((name, variable, value))
    return found


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


def _describe(message: str, file: Path | None, text: str, origins: Mapping[str, str]) -> str:
    """Turn a validation error with a JSON path into a sentence that names its source."""
    problem, _, where = message.partition(" - at `")
    path = where.rstrip("`").removeprefix("$").strip(".")
    unknown = re.search(r"unknown field `([^`]+)`", problem)
    if unknown is not None:
        path = f"{path}.{unknown[1]}".strip(".")
        hint = _suggest_key(path)
        problem = f"unknown key `{path}`" + (f", did you mean `{hint}`?" if hint else "")
        path_known = True
    else:
        path_known = bool(path)
        if path_known and path not in problem:
            problem = f"{path}: {problem[:1].lower()}{problem[1:]}"
    for name, origin in origins.items():
        if path_known and (path == name or path.startswith((f"{name}[", f"{name}."))):
            return f"{origin}: {problem}"
    if file is None:
        return problem
    line = find_line(text, path)
    return f"{file}:{line}: {problem}" if line else f"{file}: {problem}"


def _suggest_key(path: str) -> str | None:
    known = [*setting_types(), "regions", "apps"]
    for prefix, struct in (
        ("apps", AppConfig),
        ("apps.machines", MachineConfig),
        ("apps.checks", CheckConfig),
    ):
        known += [f"{prefix}.{key}" for key in struct.__struct_fields__]
    plain = re.sub(r"\[\d+\]|\[\.\.\.\]", "", path)
    close: Sequence[str] = difflib.get_close_matches(plain, known, 1, 0.75)
    return close[0] if close else None
