"""What a fly.toml comes to, and that nothing of it is lost without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from isthmus.config import AppConfig
from isthmus.fly_toml import FlyTomlError, read_fly_toml

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
        *("services[0].ports[0].port", "services[0].ports[0].handlers", "services[1].protocol"),
        *("checks.alive.type", "statics", "vm"),
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
