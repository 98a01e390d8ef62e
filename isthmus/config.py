"""The configuration of one node: what may be set, and what it defaults to.

Decides the names and meaning of every setting. Refuses to know where values come from (`config_sources`), and
processes. Invariant: a `Config` that exists is valid.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import ipaddress
import re
import typing
import urllib.parse
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from isthmus.config_machines import (
    PROCESS,
    SHUT_DOWN_DRAIN_S,
    CheckConfig,
    DriverConfig,
    MachineConfig,
    MachinesConfig,
)
from isthmus.config_values import (
    NotNegative,
    Positive,
    ValueOfKeyError,
    check_identifier,
    parse_listen,
)
from isthmus.config_values import check as _check
from replication.core.wire import CLUSTER_CHARS_MAX
from replication.seal import KEYS_MAX
from routing import geo
from routing.catalog import (
    APP_NAME,
    REGION_CODE,
    canonical_hostname,
    canonical_prefix,
    parse_address,
)
from routing.compression import BYTES_MIN, CODINGS, LEVELS, TYPES, parse_compression
from routing.machine_tls import parse_machine_tls
from routing.options import PAGE_CHARS_MAX, parse_headers
from routing.peering import NETWORKS_MAX
from routing.replay_options import TTL_S_MAX, TTL_S_MIN, parse_replay_options
from routing.stickiness import parse_sticky

if typing.TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["CheckConfig", "MachineConfig", "ValueOfKeyError", "check_identifier", "parse_listen"]

T = TypeVar("T")

TlsVersions = Annotated[tuple[Literal["TLSv1.2", "TLSv1.3"], ...], Meta(min_length=1)]

# A region for a node that is told nothing: a place of its own, equally far from everywhere.
LOCAL_REGION = "local"


# Sections with a listener of the workers.
WORKER_SECTIONS = ("proxy", "tls", "peering")


def _is_elsewhere(host: str) -> bool:
    """True for an address of another machine; what a name stands for is not known yet."""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ConfigError(Exception):
    """A setting is wrong. The message says which, where it was said, and what would be right."""


def _parse_peer(text: str) -> None:
    """Raise ValueError unless others can connect to the address: it needs a port of its own."""
    if parse_listen(text)[1] == 0:
        raise ValueError(f"`{text}` has port 0, to which nobody can connect")


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


class _Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file: unknown keys are refused, values are fixed once read."""


class ProxyConfig(_Section, frozen=True):
    """`[proxy]`: the listener that clients reach. `proxy/settings.py` has the reason of each default."""

    listen: str = "127.0.0.1:8080"
    trusted_proxies: tuple[str, ...] = ()
    proxy_protocol_from: tuple[str, ...] = ()
    machine_networks: tuple[str, ...] = ()
    client_routing: bool = True
    half_close: bool = False
    head_bytes_max: Positive = 32_768
    header_count_max: Positive = 100
    url_bytes_max: Positive = 8_192
    connections_max: Positive = 32_768
    connections_per_client_max: Positive = 1_024
    connections_per_client_per_s: NotNegative = 0
    requests_per_connection_max: Positive = 10_000
    memory_bytes_max: Annotated[int, Meta(ge=0, le=2**53)] = 0
    body_bytes_max: Annotated[int, Meta(ge=0, lt=2**53)] = 0
    compressions_max: NotNegative = 128
    replay_body_bytes_max: Positive = 1_048_576
    replays_max: Positive = 10
    attempts_max: Positive = 6
    retry_percent: NotNegative = 20
    retries_per_s_min: NotNegative = 10
    replay_cache_entries_max: NotNegative = 16_384
    queue_max: Positive = 1_024
    queue_timeout_ms: Positive = 5_000
    start_timeout_ms: Positive = 25_000
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
    upgrade_drain_ms: Positive = 300_000

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
    handshakes_per_client_per_s: NotNegative = 256
    handshake_timeout_ms: Positive = 10_000
    client_certificate: str = ""

    def __post_init__(self) -> None:
        if self.listen:
            _check("listen", parse_listen, self.listen)
            if not self.certificates:
                raise ValueOfKeyError("certificates", "the listener for TLS needs at least one")


class TcpConfig(_Section, frozen=True):
    """`[[tcp]]`: a port whose connections are passed on to an app as they are."""

    listen: str
    app: str

    def __post_init__(self) -> None:
        _check("listen", parse_listen, self.listen)
        _check("app", check_app_name, self.app)


class AdminConfig(_Section, frozen=True):
    """`[admin]`: JSON API, metrics and dashboard."""

    listen: str = "127.0.0.1:8471"
    token: str = ""

    def __post_init__(self) -> None:
        _check("listen", parse_listen, self.listen)
        if not self.token and not is_loopback(parse_listen(self.listen)[0]):
            raise ValueOfKeyError(
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
            raise ValueOfKeyError("keys_file", "gossip.keys is set as well; keep one of the two")
        host, _ = parse_listen(self.listen)
        if not self.sealed:
            self._check_unsealed(host)
        for key in ("tls_cert", "tls_key", "tls_ca"):
            if not getattr(self, key) and (self.tls_cert or self.tls_key or self.tls_ca):
                raise ValueOfKeyError(key, "tls_cert, tls_key and tls_ca go together")
        if not self.advertise and is_wildcard(host):
            raise ValueOfKeyError(
                "listen",
                f"{self.listen} is no address that others could be told: set gossip.advertise to one",
            )
        elsewhere = [peer for peer in self.join if _is_elsewhere(parse_listen(peer)[0])]
        if elsewhere and is_loopback(host):
            raise ValueOfKeyError(
                "join",
                f"{elsewhere[0]} is another machine, which {self.listen} cannot talk to: "
                "set gossip.listen to an address that others reach",
            )

    def _check_unsealed(self, host: str) -> None:
        """Raise unless all gossip stays on this machine; TLS does not help, as datagrams have none."""
        if not is_loopback(host):
            raise ValueOfKeyError(
                "listen",
                f"{self.listen} is open to others: set gossip.keys (`isthmus key` makes one), "
                "or listen on 127.0.0.1",
            )
        if self.advertise and not is_loopback(parse_listen(self.advertise)[0]):
            raise ValueOfKeyError(
                "advertise",
                f"{self.advertise} is where others are: set gossip.keys (`isthmus key` makes one)",
            )
        for peer in self.join:
            if _is_elsewhere(parse_listen(peer)[0]):
                raise ValueOfKeyError(
                    "join", f"{peer} is another machine: set gossip.keys on both (`isthmus key` makes one)"
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


class PeeringConfig(_Section, frozen=True):
    """`[peering]`: requests that other nodes want passed on to machines of this one."""

    listen: str = ""
    advertise: str = ""
    networks: Annotated[tuple[str, ...], Meta(max_length=NETWORKS_MAX)] = ()
    machines: Literal["direct", "auto", "node"] = "direct"

    def __post_init__(self) -> None:
        _check("networks", ipaddress.ip_network, *self.networks)
        if self.advertise:
            _check("advertise", _parse_peer, self.advertise)
        if not self.listen:
            return
        _check("listen", parse_listen, self.listen)
        if not self.advertise and is_wildcard(parse_listen(self.listen)[0]):
            raise ValueOfKeyError(
                "listen",
                f"{self.listen} is no address that others could be told: set peering.advertise to one",
            )

    @property
    def address(self) -> str:
        """Where others are told to connect; empty: nowhere."""
        return self.listen and (self.advertise or self.listen)


class ReplicationConfig(_Section, frozen=True):
    """`[replication]`: how much may be written here, and how much of one other node is taken in at once."""

    writes_per_s: NotNegative = 0
    table_writes_per_s: dict[str, NotNegative] = {}
    origin_changesets_per_s: NotNegative = 2_000
    origin_bytes_per_s: NotNegative = 16_777_216


class StagingConfig(_Section, frozen=True):
    """`[staging]`: changes of apps, hostnames, services and regions reach some workers first."""

    bake_ms: Annotated[int, Meta(ge=0, le=86_400_000)] = 0
    regions: tuple[str, ...] = ()


class RegionConfig(_Section, frozen=True):
    """`[regions.<code>]`: a region of your own."""

    latitude: Annotated[float, Meta(ge=-90, le=90)]
    longitude: Annotated[float, Meta(ge=-180, le=180)]
    name: str = ""


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
            raise ValueOfKeyError(re.findall(r"machine_tls\.(\w+)", str(error))[0], str(error)) from None


class ReplayCacheConfig(_Section, frozen=True):
    """`[[apps.replay_cache]]`: replays that are remembered by the value of a cookie or header."""

    type: Literal["cookie", "header"]
    name: str
    ttl_seconds: Annotated[int, Meta(ge=TTL_S_MIN, le=TTL_S_MAX)]
    path_prefix: str = "/"
    allow_bypass: bool = False


class CompressionConfig(_Section, frozen=True):
    """`[apps.compression]`: which answers are compressed, and how."""

    codings: tuple[str, ...] = CODINGS
    types: tuple[str, ...] = TYPES
    bytes_min: NotNegative = BYTES_MIN
    gzip_level: int = LEVELS["gzip"]
    br_level: int = LEVELS["br"]
    zstd_level: int = LEVELS["zstd"]

    def __post_init__(self) -> None:
        try:
            parse_compression(msgspec.structs.asdict(self))
        except ValueError as error:
            raise ValueOfKeyError(re.findall(r"compression\.(\w+)", str(error))[0], str(error)) from None


class ServiceConfig(_Section, frozen=True):
    """`[[apps.services]]`: how the app is reached on one public port, when not as on all others."""

    port: Annotated[int, Meta(ge=1, le=65_535)]
    internal_port: Annotated[int, Meta(ge=1, le=65_535)] | None = None
    handlers: tuple[Literal["tls", "http"], ...] = ()
    tls_versions: TlsVersions = ("TLSv1.2", "TLSv1.3")
    soft_limit: Positive = 20
    hard_limit: Positive | None = None
    proxy_protocol: Literal["", "v1", "v2"] = ""
    idle_timeout_ms: NotNegative = 0
    body_bytes_max: Annotated[int, Meta(ge=0, lt=2**53)] = 0

    def __post_init__(self) -> None:
        _check_limits(self.soft_limit, self.hard_limit)


class AppConfig(_Section, frozen=True):
    """`[[apps]]`: something served through this node's part of the table."""

    name: str
    hosts: tuple[str, ...] = ("*",)
    path_prefix: str = "/"
    internal_port: Annotated[int, Meta(ge=1, le=65_535)] | None = None
    handlers: tuple[Literal["tls", "http"], ...] = ("tls", "http")
    tls_versions: TlsVersions = ("TLSv1.2", "TLSv1.3")
    soft_limit: Positive = 20
    hard_limit: Positive | None = None
    idle_timeout_ms: NotNegative = 0
    body_bytes_max: Annotated[int, Meta(ge=0, lt=2**53)] = 0
    services: tuple[ServiceConfig, ...] = ()
    machines: tuple[MachineConfig, ...] = ()
    checks: tuple[CheckConfig, ...] = ()
    proxy_protocol: Literal["", "v1", "v2"] = ""
    response_headers: dict[str, bool | str | tuple[str, ...]] = {}
    maintenance: Annotated[str, Meta(max_length=PAGE_CHARS_MAX)] = ""
    force_https: bool = False
    machine_tls: MachineTlsConfig | bool = False
    pristine: bool = False
    autostart: bool = True
    autostop: Literal["off", "stop", "suspend"] = "off"
    min_machines_running: NotNegative = 0
    primary_region: str = ""
    client_routing: bool = True
    replay_from: tuple[str, ...] = ()
    replay_cache: tuple[ReplayCacheConfig, ...] = ()
    compression: CompressionConfig | bool = False
    reach: Literal["", "direct", "auto", "node"] = ""
    sticky: dict[str, bool | str] = {}
    slow_start_ms: NotNegative = 0
    panic_percent: Annotated[int, Meta(ge=0, le=100)] = 0

    def __post_init__(self) -> None:
        _check("name", check_app_name, self.name)
        _check("hosts", check_hostname, *self.hosts)
        _check("path_prefix", canonical_prefix, self.path_prefix)
        _check_limits(self.soft_limit, self.hard_limit)
        for i, port in _repeated([service.port for service in self.services]):
            raise ValueOfKeyError(f"services[{i}].port", f"port {port} is declared twice")
        for i, machine in enumerate(self.machines):
            if self.internal_port is None and parse_address(machine.address)[1] is None:
                problem = f"`{machine.address}` names no port, and the app has no internal_port"
                raise ValueOfKeyError(f"machines[{i}].address", problem)
        for key, parse in (("response_headers", parse_headers), ("sticky", parse_sticky)):
            try:
                parse(getattr(self, key))
            except ValueError as error:
                raise ValueOfKeyError(key, str(error)) from None
        for key in ("replay_from", "replay_cache"):
            try:
                parse_replay_options({key: msgspec.to_builtins(getattr(self, key))})
            except ValueError as error:
                raise ValueOfKeyError(key, str(error)) from None
        if self.proxy_protocol and self.machine_tls:
            raise ValueOfKeyError("proxy_protocol", "it does not go together with machine_tls")
        names = [check.name for check in self.checks if check.name]
        for i, name in _repeated(names):
            raise ValueOfKeyError(f"checks[{i}].name", f"check `{name}` is declared twice")


def _check_limits(soft_limit: int, hard_limit: int | None) -> None:
    if hard_limit is not None and hard_limit < soft_limit:
        raise ValueOfKeyError("hard_limit", f"{hard_limit} is below soft_limit {soft_limit}")


def _repeated(items: Sequence[T]) -> Iterator[tuple[int, T]]:
    """Yield position and value of what an earlier item says already."""
    return ((i, item) for i, item in enumerate(items) if item in items[:i])


def check_hostname(host: str) -> None:
    """Raise ValueError unless routing takes the name: a host name, `*.suffix` or `*`."""
    try:
        canonical_hostname(host)
    except ValueError:
        raise ValueError(f"`{host}` is not a host name, `*.suffix` or `*`") from None


def unknown_region(code: str, own: typing.Collection[str]) -> str | None:
    """Say what is wrong with a region code, or None: it is built in or one of `own`."""
    if code in own or code in geo.BUILT_IN:
        return None
    close = difflib.get_close_matches(code, [*own, *geo.BUILT_IN], 1)
    hint = f"did you mean `{close[0]}`?" if close else f"give it coordinates under [regions.{code}]"
    return f"unknown region `{code}`; {hint}"


class LogConfig(_Section, frozen=True):
    """`[log]`: what is written to standard error."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class AccessLogConfig(_Section, frozen=True):
    """`[access_log]`: a line for each request."""

    file: str = ""
    format: Literal["json", "combined"] = "json"
    one_in: Positive = 1


class TracingConfig(_Section, frozen=True):
    """`[tracing]`: spans for an OpenTelemetry collector."""

    endpoint: str = ""
    ratio: Annotated[float, Meta(ge=0, le=1)] = 1.0
    believe_clients: bool = True
    service_name: Annotated[str, Meta(min_length=1)] = "isthmus"
    headers: dict[str, str] = {}
    attributes: dict[str, str] = {}

    def __post_init__(self) -> None:
        if self.endpoint:
            _check("endpoint", _parse_endpoint, self.endpoint)
        for name, value in self.headers.items():
            if re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name) is None or not value.isprintable():
                raise ValueOfKeyError("headers", f"`{name}` is no header that could be sent")


def _parse_endpoint(text: str) -> None:
    """Raise ValueError unless spans can be sent to the URL."""
    url = urllib.parse.urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname or url.port == 0 or url.username:
        raise ValueError(f"`{text}` is not of the form http://host:4318 or https://host:4318")


class Config(_Section, frozen=True):
    """Everything that one node is told."""

    node: str
    data: str
    region: str = LOCAL_REGION
    workers: Annotated[int, Meta(ge=0, le=256)] = 1
    synchronous: Literal["normal", "full"] = "normal"
    proxy: ProxyConfig = ProxyConfig()
    tls: TlsConfig = TlsConfig()
    tcp: tuple[TcpConfig, ...] = ()
    admin: AdminConfig = AdminConfig()
    gossip: GossipConfig = GossipConfig()
    peering: PeeringConfig = PeeringConfig()
    replication: ReplicationConfig = ReplicationConfig()
    staging: StagingConfig = StagingConfig()
    log: LogConfig = LogConfig()
    access_log: AccessLogConfig = AccessLogConfig()
    tracing: TracingConfig = TracingConfig()
    machines: MachinesConfig = MachinesConfig()
    drivers: dict[str, DriverConfig] = {}
    regions: dict[str, RegionConfig] = {}
    apps: tuple[AppConfig, ...] = ()

    def __post_init__(self) -> None:
        _check("node", lambda name: check_identifier(name, "a node"), self.node)
        if not self.data or "\0" in self.data:
            raise ValueOfKeyError("data", "the data directory needs a name without NUL")
        for code in self.regions:
            if REGION_CODE.fullmatch(code) is None or code in geo.AREAS:
                raise ValueOfKeyError(f"regions.{code}", f"`{code}` is no code for a region: a-z, 0-9 and -")
        for name in self.drivers:
            _check(f"drivers.{name}", lambda name: check_identifier(name, "a driver"), name)
            if name == PROCESS:
                raise ValueOfKeyError(f"drivers.{name}", "that is what machines with a command have")
        self._check_listeners()
        self._check_apps()

    def _check_listeners(self) -> None:
        taken: dict[tuple[str, int], str] = {}
        listeners = self.listeners | {"admin.listen": self.admin.listen, "gossip.listen": self.gossip.listen}
        for setting, listen in listeners.items():
            address = parse_listen(listen)
            other = taken.setdefault(address, setting)
            if other != setting and address[1]:
                problem = f"{format_address(*address)} is {other} as well; choose another port"
                raise ValueOfKeyError(setting, problem)
        peering = self.peering
        if peering.listen and not self.gossip.sealed and not is_loopback(parse_listen(peering.listen)[0]):
            raise ValueOfKeyError(
                "peering.listen",
                f"{peering.listen} is open to others: set gossip.keys (`isthmus key` makes one), "
                "or listen on 127.0.0.1",
            )

    def _check_apps(self) -> None:
        for i, name in _repeated([app.name for app in self.apps]):
            raise ValueOfKeyError(f"apps[{i}].name", f"app `{name}` is declared twice")
        routes: dict[tuple[str, str], str] = {}
        machines: set[str] = set()
        for i, app in enumerate(self.apps):
            for host in app.hosts:
                route = (canonical_hostname(host), canonical_prefix(app.path_prefix))
                if routes.setdefault(route, app.name) != app.name:
                    problem = f"host `{host}` at {app.path_prefix} already leads to app `{routes[route]}`"
                    raise ValueOfKeyError(f"apps[{i}].hosts", problem)
            for j, machine in enumerate(app.machines):
                if machine.id in machines:
                    problem = f"machine `{machine.id}` is declared twice"
                    raise ValueOfKeyError(f"apps[{i}].machines[{j}].id", problem)
                machines.update({machine.id} - {""})
                if machine.driver and machine.driver not in self.drivers:
                    problem = f"there is no [drivers.{machine.driver}]"
                    raise ValueOfKeyError(f"apps[{i}].machines[{j}].driver", problem)

    @property
    def listeners(self) -> dict[str, str]:
        """The addresses that workers listen on, by setting."""
        found = {f"{section}.listen": getattr(self, section).listen for section in WORKER_SECTIONS}
        found |= {f"tcp[{i}].listen": tcp.listen for i, tcp in enumerate(self.tcp)}
        return {setting: listen for setting, listen in found.items() if listen}

    @property
    def ends_tls(self) -> bool:
        """True when TLS of clients can end at this node."""
        return bool(self.tls.certificates and (self.tls.listen or self.tcp))

    def relocate(self, listeners: Mapping[str, str]) -> Config:
        """Return the same with other addresses on which workers listen."""
        sections: dict[str, Any] = {
            section: msgspec.structs.replace(getattr(self, section), listen=listeners[f"{section}.listen"])
            for section in WORKER_SECTIONS
            if f"{section}.listen" in listeners
        }
        sections["tcp"] = tuple(
            msgspec.structs.replace(tcp, listen=listeners.get(f"tcp[{i}].listen", tcp.listen))
            for i, tcp in enumerate(self.tcp)
        )
        return msgspec.structs.replace(self, **sections)

    @property
    def machines_stop_s(self) -> float:
        """How long the processes of this node may take to end, once others have heard of it."""
        machines = [machine for app in self.apps for machine in app.machines]
        kills_ms = [machine.kill_timeout_ms for machine in machines if machine.command]
        return SHUT_DOWN_DRAIN_S + max(kills_ms) / 1000 if kills_ms else 0.0

    @property
    def database(self) -> Path:
        """The SQLite file that holds the routing table."""
        return Path(self.data) / "isthmus.db"

    @property
    def feed_socket(self) -> Path:
        """The Unix socket on which workers follow the agent."""
        return Path(self.data) / "feed.sock"
