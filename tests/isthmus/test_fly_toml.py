"""What a fly.toml comes to, and that nothing of it is lost without a word."""

from __future__ import annotations

import json
import operator
import re
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from isthmus.config import AppConfig
from isthmus.fly_toml import FlyApp, FlyTomlError, Note, read_fly_toml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FULL = """\
app = "blog"
primary_region = "ams"

[build]
  image = "registry.fly.io/blog:1"

[deploy]
  strategy = "bluegreen"
  release_command = "migrate"

[http_service]
  internal_port = 3000
  force_https = true
  auto_stop_machines = "suspend"
  auto_start_machines = true
  min_machines_running = 2
  processes = ["web"]

  [http_service.concurrency]
    type = "connections"
    soft_limit = 50
    hard_limit = 60

  [http_service.http_options]
    compress = true
    h2_backend = true
    idle_timeout = 600

    [http_service.http_options.response]
      pristine = true

      [http_service.http_options.response.headers]
        X-Frame-Options = "DENY"
        Server = false

    [[http_service.http_options.replay_cache]]
      path_prefix = "/"
      ttl_seconds = 60
      type = "cookie"
      name = "tenant"

  [http_service.tls_options]
    alpn = ["h2", "http/1.1"]
    versions = ["TLSv1.2", "TLSv1.3"]
    default_self_signed = false

  [[http_service.checks]]
    grace_period = "10s"
    interval = "1m30s"
    timeout = 1500
    method = "get"
    path = "/up"
    protocol = "http"

    [http_service.checks.headers]
      X-Forwarded-Proto = "https"

[[services]]
  protocol = "tcp"
  internal_port = 5432

  [[services.ports]]
    port = 5432
    handlers = ["tls", "proxy_proto", "pg_tls"]

    [services.ports.proxy_proto_options]
      version = "v2"

  [[services.tcp_checks]]
    interval = "15s"

[[services]]
  protocol = "udp"
  internal_port = 53

[checks.alive]
  type = "tcp"
  port = 9000

[[statics]]
  guest_path = "/srv"
  url_prefix = "/static"

[[vm]]
  memory = "1gb"
"""


def keys(text: str) -> dict[str, int | None]:
    return {note.key: note.line for note in read_fly_toml(text).notes}


def test_all_that_can_be_honoured_is_and_makes_an_app() -> None:
    app = read_fly_toml(FULL).app
    assert app == {
        "name": "blog",
        "hosts": [],
        "primary_region": "ams",
        "internal_port": 3000,
        "force_https": True,
        "autostop": "suspend",
        "min_machines_running": 2,
        "soft_limit": 50,
        "hard_limit": 60,
        "compression": True,
        "pristine": True,
        "response_headers": {"X-Frame-Options": "DENY", "Server": False},
        "replay_cache": [{"path_prefix": "/", "ttl_seconds": 60, "type": "cookie", "name": "tenant"}],
        "checks": [
            {
                "type": "http",
                "grace_ms": 10_000,
                "interval_ms": 90_000,
                "timeout_ms": 1_500,
                "method": "GET",
                "path": "/up",
                "headers": {"X-Forwarded-Proto": "https"},
            },
            {"type": "tcp", "port": 5432, "interval_ms": 15_000},
            {"type": "tcp", "name": "alive", "port": 9000},
        ],
        "services": [
            {
                "port": 5432,
                "internal_port": 5432,
                "soft_limit": 20,
                "proxy_protocol": "v2",
                "handlers": ["tls"],
            }
        ],
    }
    assert isinstance(msgspec.convert(app, AppConfig), AppConfig)


def test_all_that_is_not_is_told_with_its_line() -> None:
    lines = FULL.splitlines()
    told = keys(FULL)
    assert list(told) == [
        *("build", "deploy.strategy", "deploy.release_command", "http_service.processes"),
        *("http_service.concurrency.type", "http_service.http_options.h2_backend"),
        *("http_service.http_options.idle_timeout", "http_service.tls_options.alpn"),
        *("services[0].ports[0].port", "services[0].ports[0].handlers", "services[1]"),
        *("checks.alive.type", "statics[0]", "vm"),
    ]
    for key, line in told.items():
        assert line is not None
        assert key.split(".")[-1].split("[")[0] in lines[line - 1], (key, line)


def test_order_of_what_is_told_is_that_of_the_lines() -> None:
    lines = [note.line or 0 for note in read_fly_toml(FULL).notes]
    assert lines == sorted(lines)


def test_services_with_http_are_how_the_app_is_reached_on_all_ports() -> None:
    text = (Path(__file__).resolve().parents[2] / "fly.toml").read_text("utf-8")
    read = read_fly_toml(text)
    assert read.app == {
        "name": "isthmus",
        "hosts": [],
        "primary_region": "ams",
        "internal_port": 8080,
        "force_https": False,
        "soft_limit": 8000,
        "hard_limit": 10_000,
        "checks": [{"type": "tcp", "grace_ms": 5_000, "interval_ms": 10_000, "timeout_ms": 2_000}],
    }
    assert {note.key for note in read.notes} == {
        *("kill_signal", "kill_timeout", "build", "env", "mounts", "vm", "services[0].concurrency.type")
    }


def test_app_without_http_is_as_its_first_port_everywhere() -> None:
    app = read_fly_toml(
        'app = "db"\n[[services]]\ninternal_port = 5432\n[[services.ports]]\nport = 5432\nhandlers = []\n'
    ).app
    assert (app["internal_port"], app["handlers"], app["services"][0]["port"]) == (5432, [], 5432)


@pytest.mark.parametrize(
    ("said", "meant"),
    [("true", "stop"), ("false", None), ('"off"', None), ('"stop"', "stop"), ('"suspend"', "suspend")],
)
def test_auto_stop_is_read_in_all_its_spellings(said: str, meant: str | None) -> None:
    app = read_fly_toml(f'app = "a"\n[http_service]\nauto_stop_machines = {said}\n').app
    assert app.get("autostop") == meant


@pytest.mark.parametrize(
    ("concurrency", "expected"), [("hard_limit = 5", (5, 5)), ("hard_limit = 50", (20, 50)), ("", (20, None))]
)
def test_soft_limit_is_never_over_the_hard_one(concurrency: str, expected: tuple[Any, Any]) -> None:
    app = read_fly_toml(f'app = "a"\n[http_service]\n[http_service.concurrency]\n{concurrency}\n').app
    assert (app["soft_limit"], app.get("hard_limit")) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "1: app: the file names none"),
        ("app = [", "1: "),
        ("app = 'a'\n\n[http_service", "3: "),
        ("app = 'a'\nprimary_region ams\n[http_service]", "2: Expected '='"),
        ('app = "a"\n[http_service]\ninternal_port = "x"', "3: http_service.internal_port: must be int"),
        ('app = "a"\n[http_service]\ninternal_port = true', "3: http_service.internal_port: must be int"),
        ('app = "a"\n[http_service]\nauto_stop_machines = "never"', "3: http_service.auto_stop_machines"),
        ('app = "a"\nservices = [1]', "2: services: must be tables"),
        ('app = "a"\nhttp_service = 5', "2: http_service: must be dict"),
        (
            'app = "a"\n[[http_service.checks]]\ninterval = "soon"',
            "3: http_service.checks[0].interval: `soon`",
        ),
        ('app = "a"\n[checks.x]\ntype = "udp"', "3: checks.x.type"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(FlyTomlError) as caught:
        read_fly_toml(text)
    assert str(caught.value).startswith(problem)


def test_unknown_key_is_told_too() -> None:
    assert keys('app = "a"\n[http_service]\nnonsense = 1\n') == {"http_service.nonsense": 3}


def test_name_of_the_flag_comes_before_that_of_the_file() -> None:
    assert read_fly_toml('app = "a"', "b").app["name"] == "b"


CHECK = {
    "grace_period": "5s",
    "interval": "20s",
    "timeout": "3s",
    "method": "post",
    "path": "/up",
    "protocol": "https",
    "tls_skip_verify": True,
    "tls_server_name": "app.test",
    "headers": {"X-Probe": "1"},
}
HTTP_OPTIONS = {
    "compress": True,
    "h2_backend": True,
    "idle_timeout": 60,
    "headers_read_timeout": 10,
    "response": {"headers": {"X-Frame-Options": "DENY", "Server": False}, "pristine": True},
    "replay_cache": [
        {"path_prefix": "/api", "type": "cookie", "name": "at", "ttl_seconds": 60, "allow_bypass": True}
    ],
}
TLS_OPTIONS = {"alpn": ["h2", "http/1.1"], "versions": ["TLSv1.3"], "default_self_signed": True}
SCALING = {"auto_stop_machines": "suspend", "auto_start_machines": False, "min_machines_running": 2}
LIMITS = {"type": "connections", "soft_limit": 5, "hard_limit": 9}
# Of no port that the app is reached on anyway.
OTHER_PORT = {
    "port": 5432,
    "handlers": ["tls", "proxy_proto", "pg_tls"],
    "force_https": True,
    "tls_options": TLS_OPTIONS,
    "http_options": HTTP_OPTIONS,
    "proxy_proto_options": {"version": "v2"},
}
MACHINE_CHECK = {"image": "curl", "entrypoint": ["sh"], "command": ["-c", "true"], "kill_timeout": "5s"}
# Every key that Fly's reference has, and some of older files; no value is as if nothing had been said.
TOP = {
    "app": "blog",
    "primary_region": "ams",
    "console_command": "sh",
    "kill_signal": "SIGINT",
    "kill_timeout": 5,
    "swap_size_mb": 512,
    "host_dedication_id": "x",
    "build": {"builder": "b", "image": "i", "dockerfile": "d", "build-target": "t", "args": {"A": "b"}},
    "deploy": {
        "release_command": "migrate",
        "release_command_timeout": "1m",
        "release_command_vm": {"size": "s"},
        "seed_command": "seed",
        "strategy": "canary",
        "max_unavailable": 0.5,
        "wait_timeout": "5m",
    },
    "env": {"A": "b"},
    "experimental": {"cmd": ["x"], "auto_rollback": True},
    "files": [{"guest_path": "/a", "raw_value": "x"}],
    "metrics": [{"port": 9091, "path": "/metrics"}],
    "mounts": [{"source": "data", "destination": "/data", "initial_size": "1gb"}],
    "processes": {"web": "serve"},
    "restart": [{"policy": "always", "retries": 3, "processes": ["web"]}],
    "statics": [
        {"guest_path": "/srv", "url_prefix": "/static"},
        {"guest_path": "/", "url_prefix": "/", "tigris_bucket": "b", "index_document": "index.html"},
    ],
    "vm": [{"size": "shared-cpu-1x", "memory": "1gb", "cpus": 2, "processes": ["web"]}],
    "checks": {"alive": {"type": "http", "port": 9000, "processes": ["web"], **CHECK}},
}
WITH_HTTP_SERVICE = TOP | {
    "http_service": {
        "internal_port": 3000,
        "force_https": True,
        "processes": ["web"],
        "concurrency": LIMITS,
        "http_options": HTTP_OPTIONS,
        "tls_options": TLS_OPTIONS,
        "checks": [CHECK],
        "machine_checks": [MACHINE_CHECK],
        **SCALING,
    },
    "services": [{"protocol": "udp", "internal_port": 53, "ports": [{"port": 53}]}],
}
WITH_SERVICES = TOP | {
    "services": [
        {
            "internal_port": 3000,
            "processes": ["web"],
            "concurrency": LIMITS,
            "force_instance_key": "k",
            "force_instance_description": "d",
            "ports": [
                {
                    "port": 8443,
                    "handlers": ["tls", "http", "proxy_proto"],
                    "force_https": True,
                    "tls_options": TLS_OPTIONS,
                    "http_options": HTTP_OPTIONS,
                    "proxy_proto_options": {"version": "v2"},
                },
                {"start_port": 10_000, "end_port": 10_010, "handlers": ["tls"]},
            ],
            "tcp_checks": [{"grace_period": "5s", "interval": "20s", "timeout": "3s"}],
            "http_checks": [CHECK],
            "machine_checks": [MACHINE_CHECK],
            **SCALING,
        },
        {"internal_port": 5432, "concurrency": LIMITS | {"type": "requests"}, "ports": [OTHER_PORT]},
        {"internal_port": 5433, "ports": [{"port": 5433, "tls_options": TLS_OPTIONS}]},
        {"internal_port": 5434, "concurrency": LIMITS},
    ]
}
FILES = {"http_service": WITH_HTTP_SERVICE, "services": WITH_SERVICES}
KeyPath = tuple[str | int, ...]


def to_toml(value: Any) -> str:
    """A value in TOML, all of it on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{to_toml(key)} = {to_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return json.dumps(value)


def read(file: dict[str, Any]) -> FlyApp:
    return read_fly_toml("".join(f"{to_toml(key)} = {to_toml(value)}\n" for key, value in file.items()))


@cache
def read_whole(name: str) -> FlyApp:
    return read(FILES[name])


def walk(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """All values in it, tables and what is in them alike, with their paths."""
    yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, (*path, key))
    elif isinstance(value, list) and isinstance(value[0], dict):
        for i, item in enumerate(value):
            yield from walk(item, (*path, i))


def changed(file: dict[str, Any], path: KeyPath, change: Callable[[Any, Any], None]) -> dict[str, Any]:
    """A copy of the file of which `change` gets the table with the last key of the path, and that."""
    copy = deepcopy(file)
    table: Any = copy
    for key in path[:-1]:
        table = table[key]
    change(table, path[-1])
    return copy


def is_told(path: KeyPath, notes: list[Note]) -> bool:
    """True when a note is about the value, or about a table that it is in."""
    shown = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")
    return any(f"{shown}.".startswith((f"{note.key}.", f"{note.key}[")) for note in notes)


LEAVES = [
    (name, path)
    for name, file in FILES.items()
    for path, value in walk(file)
    if path != ("app",) and not isinstance(value, dict)
    if not isinstance(value, list) or not isinstance(value[0], dict)
]
TABLES = [
    (name, path)
    for name, file in FILES.items()
    for path, value in walk(file)
    if isinstance(value, dict) and path != ("checks",)  # whose keys are names
]


@pytest.mark.parametrize(("name", "path"), LEAVES)
def test_each_known_key_is_honoured_or_told(name: str, path: KeyPath) -> None:
    whole = read_whole(name)
    try:
        without = read(changed(FILES[name], path, lambda table, key: table.pop(key))).app
    except FlyTomlError:
        return  # it is not to be done without
    assert without != whole.app or is_told(path, whole.notes)


@pytest.mark.parametrize(("name", "path"), TABLES)
def test_each_unknown_key_is_told_wherever_it_stands(name: str, path: KeyPath) -> None:
    file = changed(FILES[name], (*path, "nonsense"), lambda table, key: table.update({key: "x"}))
    found = read(file)
    assert found.app != read_whole(name).app or is_told((*path, "nonsense"), found.notes)


@pytest.mark.parametrize("odd", [5, True, "x", [1], [{}], {"a": 5}])
@pytest.mark.parametrize("name", FILES)
def test_odd_values_are_refused_with_their_place_or_read(name: str, odd: Any) -> None:
    file = {"app": "blog", name: FILES[name][name], "checks": TOP["checks"], "statics": TOP["statics"]}
    outcomes = []
    for path, _ in walk(file):
        if path:
            try:
                read(changed(file, path, lambda table, key: operator.setitem(table, key, odd)))
                outcomes.append("read")
            except FlyTomlError as error:
                outcomes.append(re.sub(r"\d+: \S+: .+", "refused", str(error)))
    assert set(outcomes) == {"read", "refused"}


@pytest.mark.parametrize(
    ("said", "versions", "notes"),
    [
        ({}, None, []),
        ({"versions": ["TLSv1.2", "TLSv1.3"], "alpn": ["http/1.1"]}, None, []),
        ({"versions": ["TLSv1.3"]}, ["TLSv1.3"], []),
        ({"versions": ["TLSv1.1", "TLSv1.2"]}, ["TLSv1.2"], ["not honoured: TLSv1.1"]),
        ({"versions": ["SSLv3"]}, None, ["not honoured: SSLv3"]),
        ({"alpn": ["h2", "http/1.1"]}, None, ["not honoured: h2; clients get http/1.1"]),
        ({"alpn": ["mqtt"]}, None, ["not honoured: mqtt; clients get http/1.1, or agree on nothing"]),
    ],
)
def test_what_of_tls_options_holds(
    said: dict[str, Any], versions: list[str] | None, notes: list[str]
) -> None:
    http = read({"app": "a", "http_service": {"tls_options": said}})
    assert (http.app.get("tls_versions"), [note.text for note in http.notes]) == (versions, notes)
    port = {"port": 8883, "handlers": ["tls"], "tls_options": said}
    raw = read({"app": "a", "services": [{"ports": [port]}]})
    assert raw.app["services"][0].get("tls_versions") == versions
    assert [note.text for note in raw.notes if "tls_options" in note.key] == notes
    assert isinstance(msgspec.convert(raw.app, AppConfig), AppConfig)


def test_each_of_the_statics_is_told_with_what_it_says() -> None:
    notes = {note.key: note.text for note in read(TOP).notes}
    assert "url_prefix /static, guest_path /srv:" in notes["statics[0]"]
    assert "tigris_bucket b, index_document index.html:" in notes["statics[1]"]
