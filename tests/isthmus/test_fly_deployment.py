"""fly.toml and the Dockerfile agree with each other and with what a node understands."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from isthmus.config import Config, ConfigError, parse_listen
from isthmus.config_sources import load_config

ROOT = Path(__file__).resolve().parents[2]
KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="

# What Fly sets in every Machine.
MACHINE = {
    "FLY_APP_NAME": "my-edge",
    "FLY_MACHINE_ID": "90801679a10038",
    "FLY_REGION": "syd",
    "FLY_PRIVATE_IP": "fdaa:0:18:a7b:7d:f066:9f3c:2",
}


@pytest.fixture
def fly() -> dict[str, Any]:
    return tomllib.loads((ROOT / "fly.toml").read_text("utf-8"))


def load(fly: dict[str, Any], **secrets: str) -> Config:
    return load_config(None, {}, {**MACHINE, **fly["env"], **secrets})


def test_a_machine_configures_itself_from_what_fly_says(fly: dict[str, Any]) -> None:
    config = load(fly, ISTHMUS_GOSSIP__KEYS=KEY)
    assert (config.node, config.region) == ("90801679a10038", "syd")
    assert config.gossip.listen == "[fdaa:0:18:a7b:7d:f066:9f3c:2]:8472"
    assert config.gossip.join == ("my-edge.internal:8472",)
    assert config.log.format == "json"


def test_without_the_secret_key_a_machine_refuses_to_gossip(fly: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"set gossip\.keys"):
        load(fly)


def test_the_service_reaches_the_proxy(fly: dict[str, Any]) -> None:
    host, port = parse_listen(load(fly, ISTHMUS_GOSSIP__KEYS=KEY).proxy.listen)
    (service,) = fly["services"]
    assert (host, port) == ("0.0.0.0", service["internal_port"])
    assert {entry["port"]: set(entry["handlers"]) for entry in service["ports"]} == {
        80: {"http"},
        443: {"http", "tls"},
    }


def test_the_admin_listener_stays_inside_the_machine(fly: dict[str, Any]) -> None:
    config = load(fly, ISTHMUS_GOSSIP__KEYS=KEY)
    assert parse_listen(config.admin.listen)[0] == "127.0.0.1"


def test_state_is_on_the_volume(fly: dict[str, Any]) -> None:
    config = load(fly, ISTHMUS_GOSSIP__KEYS=KEY)
    assert config.data == fly["mounts"]["destination"]


def test_a_machine_has_time_to_drain_before_it_is_killed(fly: dict[str, Any]) -> None:
    config = load(fly, ISTHMUS_GOSSIP__KEYS=KEY)
    assert fly["kill_signal"] == "SIGTERM"
    assert int(fly["kill_timeout"].removesuffix("s")) * 1000 > config.proxy.drain_ms + 5_000


def test_the_image_holds_every_package_and_runs_a_node(fly: dict[str, Any]) -> None:
    lines = (ROOT / "Dockerfile").read_text("utf-8").splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert f"COPY {package} {package}" in lines
        assert f"!{package}" in (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert lines[-1] == 'CMD ["isthmus", "run"]'
    assert f"ENV PATH=/opt/isthmus/bin:$PATH ISTHMUS_DATA={fly['mounts']['destination']}" in lines
