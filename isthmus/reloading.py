"""A node's configuration while it runs: what of a changed one takes effect at once.

Decides which settings change live, which take a restart, and what is told of it. Refuses to know processes.
Invariant: what is in use is always one whole valid configuration; a fresh one that is wrong changes nothing.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from isthmus.config import Config, ConfigError
from isthmus.config_sources import get_setting, setting_types

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

# Sections and settings that change live. All others are tied to what is made once in the life of a process:
# sockets, the database, the identity of the node.
_LIVE = ("access_log", "apps", "gossip.keys", "gossip.keys_file", "log", "proxy", "regions", "tls", "tracing")
_NOT_LIVE = ("proxy.listen", "tls.listen")

# Sections with an address of which the system may have chosen the port.
LISTENERS = ("proxy", "tls", "admin", "gossip", "peering")


class Lifecycle(msgspec.Struct, frozen=True):
    """What became of the last reload and of the last upgrade; problems are empty when all went well."""

    generation: int = 1  # counts upgrades that succeeded
    reload_problem: str = ""
    kept: str = ""  # which process goes on with its former settings all the same, and why
    changed: tuple[str, ...] = ()  # settings that the last reload changed
    restart: tuple[str, ...] = ()  # settings that the sources say otherwise, until a restart or an upgrade
    upgrade_problem: str = ""
    is_upgrading: bool = False


class ReloadPlan(NamedTuple):
    """What a reload would do."""

    used: Config  # what would be in use
    told: Config  # what the sources said of everything that is in use
    changed: tuple[str, ...]
    restart: tuple[str, ...]


def is_live(setting: str) -> bool:
    """True when a running node can take up a change of this setting."""
    section = setting.partition(".")[0]
    return (setting in _LIVE or section in _LIVE) and setting not in _NOT_LIVE


def plan_reload(told: Config, used: Config, fresh: Config) -> ReloadPlan:
    """Return what becomes of a node when its sources say `fresh` and no longer `told`.

    `used` differs from `told` in what the system chose, such as ports. Raises ConfigError when what can
    change live makes no sense without what cannot.
    """
    changed: list[str] = []
    restart: list[str] = []
    for setting in (*setting_types(), "regions", "apps", "tcp", "drivers"):
        if get_setting(told, setting) != get_setting(fresh, setting):
            live = is_live(setting) and not (setting.startswith("gossip.") and told.gossip.sealed is False)
            (changed if live else restart).append(setting)
    try:
        return ReloadPlan(
            _with(used, fresh, changed), _with(told, fresh, changed), tuple(changed), tuple(restart)
        )
    except ValueError as error:
        raise ConfigError(f"{error}; that takes a restart, with {', '.join(restart)}") from None


def _with(config: Config, fresh: Config, settings: list[str]) -> Config:
    """Return the configuration with these settings as in the fresh one."""
    changes: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for setting in settings:
        section, dot, key = setting.partition(".")
        if dot:
            sections.setdefault(section, {})[key] = get_setting(fresh, setting)
        else:
            changes[setting] = get_setting(fresh, setting)
    for section, keys in sections.items():
        changes[section] = msgspec.structs.replace(getattr(config, section), **keys)
    return msgspec.structs.replace(config, **changes)


def carry_addresses(told: Config, used: Config, fresh: Config) -> Config:
    """Return the fresh configuration with the addresses in use where the sources say the same of them."""
    for section in LISTENERS:
        if getattr(fresh, section).listen == getattr(told, section).listen:
            listen = getattr(used, section).listen
            changed = msgspec.structs.replace(getattr(fresh, section), listen=listen)
            fresh = msgspec.structs.replace(fresh, **{section: changed})
    carried = {theirs: ours.listen for theirs, ours in zip(told.tcp, used.tcp, strict=True)}
    tcp = tuple(msgspec.structs.replace(one, listen=carried.get(one, one.listen)) for one in fresh.tcp)
    return msgspec.structs.replace(fresh, tcp=tcp)


class Reloader:
    """Reads the configuration of a running node again."""

    def __init__(
        self, used: Config, told: Config | None = None, read: Callable[[], Config] | None = None
    ) -> None:
        """Begin with a configuration in use. Without `read`, a reload only looks at files that it names."""
        self.used = used
        self.told = told or used
        self.lifecycle = Lifecycle()
        self._read = read or (lambda: self.told)

    async def reload(self, adopt: Callable[[Config], Awaitable[str]]) -> Lifecycle:
        """Have the node adopt what the sources say now.

        `adopt` raises ConfigError when it cannot be done, and has changed nothing then. It returns why one
        process goes on with its former settings, if one does.
        """
        problem = kept = ""
        changed: tuple[str, ...] = ()
        restart = self.lifecycle.restart
        try:
            plan = plan_reload(self.told, self.used, self._read())
            kept = await adopt(plan.used)
            self.used, self.told, changed, restart = plan
        except ConfigError as error:
            problem = str(error)
        except Exception as error:
            log.exception("the configuration could not be read again")
            problem = f"internal error: {error!r}"
        self.lifecycle = msgspec.structs.replace(
            self.lifecycle, reload_problem=problem, kept=kept, changed=changed, restart=restart
        )
        return self.lifecycle
