"""Which settings can be rolled out.

Decides by name: those that a running node takes up, and that are not tied to one node. Knows no files.
Invariant: what is let through makes sense beside the defaults.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from isthmus.config import ConfigError
from isthmus.config_sources import get_setting, parse_settings
from isthmus.reloading import is_live

if TYPE_CHECKING:
    from isthmus.config import Config

_APART: Final = {
    "apps": "apps are in the table that all nodes share; see `isthmus apply` and `isthmus deploy`",
    "regions": "regions are in the table that all nodes share, by the file of any node",
    "gossip.keys": "a table that all nodes read is no place for keys; see `isthmus key`",
    "gossip.keys_file": "a table that all nodes read is no place for keys; see `isthmus key`",
    "tracing.headers": "a table that all nodes read is no place for secrets; say it on each node",
}


def check_settings(text: str) -> None:
    """Raise ConfigError unless all of a TOML text can be rolled out."""
    for name in parse_settings(text):
        if name in _APART:
            raise ConfigError(f"`{name}` cannot be rolled out: {_APART[name]}")
        if not is_live(name):
            raise ConfigError(f"`{name}` cannot be rolled out: it takes a restart, and is said on each node")


def list_own(text: str, config: Config) -> list[str]:
    """Return the settings of a text that a node has otherwise, as it says so itself."""
    return [name for name, value in parse_settings(text).items() if get_setting(config, name) != value]
