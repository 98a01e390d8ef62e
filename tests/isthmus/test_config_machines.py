from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from isthmus.config import Config, ConfigError
from isthmus.config_machines import PROCESS, parse_statuses
from isthmus.config_sources import load_config

if TYPE_CHECKING:
    from pathlib import Path


def load(directory: Path, text: str) -> Config:
    file = directory / "isthmus.toml"
    file.write_text(text, "utf-8")
    return load_config(file, {}, {"XDG_STATE_HOME": str(directory)})


APP = '[[apps]]\nname = "web"\n'
MACHINE = APP + '[[apps.machines]]\naddress = "a:1"\n'


def test_machines_have_a_command_a_driver_or_neither(tmp_path: Path) -> None:
    text = APP + (
        '[[apps.machines]]\naddress = "a:1"\ncommand = ["true"]\nenv = {A = "b"}\n'
        '[[apps.machines]]\naddress = "a:2"\ndriver = "fly-1"\n'
        '[[apps.machines]]\naddress = "a:3"\n'
        '[drivers.fly-1]\ntype = "fly"\ntoken = "t"\n'
    )
    config = load(tmp_path, text)
    assert [m.driver_name for m in config.apps[0].machines] == [PROCESS, "fly-1", ""]
    assert config.drivers["fly-1"].timeout_ms == 30_000


WRONG = {
    "no such driver": (MACHINE + 'driver = "x"', "isthmus.toml:5: apps[0].machines[0].driver: there is no"),
    "both": (MACHINE + 'driver = "x"\ncommand = ["y"]', "not both"),
    "env without command": (MACHINE + 'env = {A = "b"}', "are for machines with a command"),
    "NUL": (MACHINE + 'command = ["a\\u0000b"]', "can hold a NUL"),
    "restart": (MACHINE + 'command = ["a"]\nrestart = "maybe"', "restart: invalid enum value 'maybe'"),
    "kill": (
        MACHINE + 'command = ["a"]\nkill_timeout_ms = 400000',
        "kill_timeout_ms: expected `int` <= 300000",
    ),
    "driver's type": (
        '[drivers.x]\ntype = "k8s"',
        "isthmus.toml:2: drivers.x.type: invalid enum value 'k8s'",
    ),
    "driver's name": ('[drivers.process]\ntype = "fly"\ntoken = "t"', "machines with a command have"),
    "driver's odd name": ('[drivers."a b"]\ntype = "fly"\ntoken = "t"', "no name for a driver"),
    "no secret": ('[drivers.x]\ntype = "webhook"\nurl = "http://a"', "drivers.x.secret: a webhook needs"),
    "no token": ('[drivers.x]\ntype = "fly"', "drivers.x.token: the Machines API wants a token"),
    "url": ('[drivers.x]\ntype = "fly"\ntoken = "t"\nurl = "ftp://a"', "drivers.x.url: `ftp://a` is no URL"),
    "typo": ('[drivers.x]\ntype = "fly"\ntokn = "t"', "did you mean `drivers.*.token`"),
    "autostop": (APP + 'autostop = "maybe"', "autostop: invalid enum value 'maybe'"),
    "header": (APP + '[[apps.checks]]\nheaders = {"a b" = "c"}', "`a b` is no header that a check can send"),
    "framing": (APP + '[[apps.checks]]\nheaders = {Connection = "close"}', "no header that a check can send"),
    "value": (APP + '[[apps.checks]]\nheaders = {A = "b\\r\\nc"}', "not printable ASCII"),
    "body": (APP + '[[apps.checks]]\nmethod = "HEAD"\nbody = "x"', "an answer to HEAD has none"),
    "status": (APP + '[[apps.checks]]\nstatus = ["2xx"]', "`2xx` is neither a status nor a range"),
    "no status": (APP + "[[apps.checks]]\nstatus = []", "no status would do"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused_and_named(tmp_path: Path, case: str) -> None:
    text, told = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("said", "ranges"), [(("200-299",), ((200, 299),)), ((204, "301-302"), ((204, 204), (301, 302)))]
)
def test_statuses_are_numbers_and_ranges(
    said: tuple[int | str, ...], ranges: tuple[tuple[int, int], ...]
) -> None:
    assert parse_statuses(said) == ranges


@pytest.mark.parametrize("said", [("100",), ("600",), ("299-200",), ("200-",), (True,)])
def test_what_is_no_status_is_refused(said: tuple[int | str, ...]) -> None:
    with pytest.raises(ValueError, match="neither a status nor a range"):
        parse_statuses(said)


def test_time_to_stop_is_that_of_the_slowest_command(tmp_path: Path) -> None:
    assert load(tmp_path, MACHINE).machines_stop_s == 0.0
    slow = (
        MACHINE
        + 'command = ["a"]\nkill_timeout_ms = 30000\n[[apps.machines]]\naddress = "a:2"\ncommand = ["b"]'
    )
    assert load(tmp_path, slow).machines_stop_s == 32.0
