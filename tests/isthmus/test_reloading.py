"""What of a changed configuration takes effect in a running node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from isthmus.config import (
    AppConfig,
    Config,
    ConfigError,
    DriverConfig,
    GossipConfig,
    LogConfig,
    MachineConfig,
    ProxyConfig,
    RegionConfig,
    TlsConfig,
)
from isthmus.config_sources import setting_types
from isthmus.reloading import Reloader, carry_addresses, is_live, plan_reload

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


def config(**changes: Any) -> Config:
    return Config(node="n1", data="/nowhere", **changes)


TOLD = config(proxy=ProxyConfig(listen="127.0.0.1:0"))
MOON = {"moon": RegionConfig(latitude=0, longitude=0)}
USED = config(proxy=ProxyConfig(listen="127.0.0.1:1234"))


@pytest.mark.parametrize(
    ("fresh", "changed"),
    [
        (config(proxy=ProxyConfig(listen="127.0.0.1:0", head_timeout_ms=5)), ("proxy.head_timeout_ms",)),
        (msgspec.structs.replace(TOLD, log=LogConfig(level="debug")), ("log.level",)),
        (msgspec.structs.replace(TOLD, apps=(AppConfig(name="a"),)), ("apps",)),
        (
            msgspec.structs.replace(TOLD, regions=MOON),
            ("regions",),
        ),
        (TOLD, ()),
    ],
)
def test_live_settings_change_and_chosen_ports_stay(fresh: Config, changed: tuple[str, ...]) -> None:
    plan = plan_reload(TOLD, USED, fresh)
    assert (plan.changed, plan.restart) == (changed, ())
    assert plan.told == fresh
    assert plan.used.proxy.listen == "127.0.0.1:1234"
    assert plan.used == carry_addresses(TOLD, USED, fresh)


@pytest.mark.parametrize(
    ("fresh", "restart"),
    [
        (config(proxy=ProxyConfig(listen="127.0.0.1:80")), ("proxy.listen",)),
        (msgspec.structs.replace(TOLD, workers=4), ("workers",)),
        (msgspec.structs.replace(TOLD, node="n2", region="ams"), ("node", "region")),
        (msgspec.structs.replace(TOLD, gossip=GossipConfig(keys=(KEY,))), ("gossip.keys",)),
    ],
)
def test_other_settings_are_named_and_stay(fresh: Config, restart: tuple[str, ...]) -> None:
    plan = plan_reload(TOLD, USED, fresh)
    assert (plan.changed, plan.restart) == ((), restart)
    assert (plan.used, plan.told) == (USED, TOLD)


def test_keys_change_where_there_were_some() -> None:
    told = config(gossip=GossipConfig(keys=(KEY,)))
    fresh = config(gossip=GossipConfig(keys_file="/keys"))
    plan = plan_reload(told, told, fresh)
    assert plan.changed == ("gossip.keys", "gossip.keys_file")
    assert plan.used == fresh


def test_what_makes_no_sense_without_a_restart_is_refused() -> None:
    told = config(tls=TlsConfig(listen="127.0.0.1:443", certificates=("/c",)))
    with pytest.raises(ConfigError, match=r"needs at least one; that takes a restart, with tls\.listen"):
        plan_reload(told, told, config())


def test_drivers_take_a_restart_and_so_do_machines_that_name_a_new_one() -> None:
    drivers = {"hook": DriverConfig(type="webhook", url="http://127.0.0.1:1", secret="s")}
    plan = plan_reload(config(), config(), config(drivers=drivers))
    assert (plan.changed, plan.restart) == ((), ("drivers",))
    apps = (AppConfig(name="web", machines=(MachineConfig(address="127.0.0.1:80", driver="hook"),)),)
    with pytest.raises(ConfigError, match=r"no \[drivers.hook\]; that takes a restart, with drivers"):
        plan_reload(config(), config(), config(drivers=drivers, apps=apps))


def test_every_setting_is_either_live_or_not() -> None:
    live = {setting for setting in setting_types() if is_live(setting)}
    assert {"proxy.send_timeout_ms", "access_log.file", "tls.certificates", "gossip.keys_file"} <= live
    assert live.isdisjoint({"proxy.listen", "tls.listen", "admin.token", "gossip.join", "data", "workers"})


class Node:
    """Adopts what it is given, unless it is told to refuse."""

    def __init__(self) -> None:
        self.adopted: list[Config] = []
        self.refusal = ""

    async def adopt(self, config: Config) -> None:
        if self.refusal:
            raise ConfigError(self.refusal)
        self.adopted.append(config)


def sources(*said: Config | str) -> Callable[[], Config]:
    """Say one after the other; a text is what is wrong."""
    left = list(said)

    def read() -> Config:
        one = left.pop(0)
        if isinstance(one, str):
            raise ConfigError(one)
        return one

    return read


async def test_a_refused_configuration_leaves_the_last_good_one() -> None:
    good = msgspec.structs.replace(TOLD, log=LogConfig(level="debug"), workers=3)
    other = msgspec.structs.replace(TOLD, log=LogConfig(level="error"))
    reloader, node = Reloader(USED, TOLD, sources(good, "line 3", other, good)), Node()
    adopt: Callable[[Config], Awaitable[None]] = node.adopt
    first = await reloader.reload(adopt)
    assert (first.changed, first.restart, first.reload_problem) == (("log.level",), ("workers",), "")
    second = await reloader.reload(adopt)
    # What takes a restart still does.
    assert (second.changed, second.restart, second.reload_problem) == ((), ("workers",), "line 3")
    node.refusal = "an agent says no"
    third = await reloader.reload(adopt)
    assert third.reload_problem == "an agent says no"
    assert reloader.used.log.level == "debug"
    node.refusal = ""
    fourth = await reloader.reload(adopt)
    assert (fourth.changed, fourth.restart) == ((), ("workers",))
    assert [config.log.level for config in node.adopted] == ["debug", "debug"]
    assert [config.workers for config in node.adopted] == [1, 1]
