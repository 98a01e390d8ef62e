"""Where the configuration comes from: defaults, rollouts, the file, the environment, flags; the later wins.

Decides how these are merged, and how a mistake is told. Knows no setting by itself but those that a platform
gives. Invariant: whatever is wrong is refused with the file and line, variable or flag that said it.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import socket
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from isthmus.config import (
    LOCAL_REGION,
    AppConfig,
    CheckConfig,
    CompressionConfig,
    Config,
    ConfigError,
    GossipConfig,
    MachineConfig,
    MachineTlsConfig,
    RegionConfig,
    ReplayCacheConfig,
    ServiceConfig,
    TcpConfig,
    ValueOfKeyError,
    parse_listen,
    unknown_region,
)
from isthmus.config_machines import DriverConfig
from isthmus.rollouts.overlay import Overlay
from isthmus.toml_lines import find_line

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

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


def default_data_dir(environ: Mapping[str, str]) -> Path:
    """Return where state goes when nothing is said: /var/lib for root, the XDG state directory otherwise."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/var/lib/isthmus")
    base = environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "isthmus"


def load_config(
    file: Path | None,
    flags: Mapping[str, Any],
    environ: Mapping[str, str] = os.environ,
    *,
    is_start: bool = False,
) -> Config:
    """Merge defaults, what was rolled out, file, environment and flags into a valid Config.

    Keys of `flags` are dotted names (`gossip.listen`); values of None were not given. Raises ConfigError. At
    the start of a node, settings that were rolled out are left out when they are on trial or make no sense.
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
    overlay = Overlay(Path(str(merged["data"]))).read(is_start=is_start)
    try:
        return _convert(*_lay_under(overlay, merged, origins), file, text)
    except ConfigError as error:
        if not (overlay and is_start):
            raise
        config = _convert(merged, origins, file, text)  # or what is wrong is here, and told
        log.warning("settings that were rolled out are left out", extra={"problem": str(error)})
        return config


def _convert(merged: dict[str, Any], origins: Mapping[str, str], file: Path | None, text: str) -> Config:
    try:
        config = msgspec.convert(merged, Config)
        _check_regions(config)
    except msgspec.ValidationError as error:
        raise ConfigError(_describe(error, merged, file, text, origins)) from None
    return config


def _lay_under(
    overlay: str, merged: Mapping[str, Any], origins: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what is merged, and where it is from, with an overlay where nothing else is said."""
    tree: dict[str, Any] = {
        name: dict(value) if isinstance(value, dict) else value for name, value in merged.items()
    }
    told = dict(origins)
    for name, value in _list_settings(_parse_toml(overlay, "what was rolled out")).items():
        if _get(tree, name) is None:
            _set(tree, name, value)
            told[name] = "rolled out to all nodes"
    return tree, told


def parse_settings(text: str) -> dict[str, Any]:
    """Return the settings that a TOML text gives, by dotted name, and other sections of it by theirs.

    Raises ConfigError when they make no sense beside the defaults.
    """
    tree = _parse_toml(text, "settings")
    config = _convert({"node": "any", "data": "/", **tree}, {}, Path("settings"), text)
    known = list(_list_settings(tree))
    sections = {name.partition(".")[0] for name in known}
    return {name: get_setting(config, name) for name in (*known, *(tree.keys() - sections))}


def _list_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name in setting_types() if (value := _get(tree, name)) is not None}


def _read_toml(file: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    return text, _parse_toml(text, str(file))


def _parse_toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: {error}") from None


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
        _, item = typing.get_args(kind)
        return {name.strip(): _parse_variable(item, value.strip()) for name, _, value in pairs}
    if kind is bool:
        return {"true": True, "false": False}.get(raw.lower(), raw)
    if kind is int and re.fullmatch(r"-?[0-9]{1,18}", raw):
        return int(raw)
    if kind is float and re.fullmatch(r"[0-9]{1,9}(?:\.[0-9]{1,9})?", raw):
        return float(raw)
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
        elif name not in ("regions", "drivers", "apps", "tcp"):
            found[name] = kind
    return found


def get_setting(config: Config, setting: str) -> Any:
    """Return what a configuration says of a setting with a dotted name."""
    value: Any = config
    for part in setting.split("."):
        value = getattr(value, part)
    return value


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
        if isinstance(error.__cause__, ValueOfKeyError):
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
    """Put the code of the wrong region, or the name of the driver, where the path of msgspec has dots."""
    kinds: dict[str, type[Struct]] = {"regions": RegionConfig, "drivers": DriverConfig}
    section = path.partition("[...]")[0]
    if section in kinds:
        for name, value in merged[section].items():
            try:
                msgspec.convert(value, kinds[section])
            except msgspec.ValidationError:
                return path.replace("[...]", f".{name}", 1)
    return path


def _without_indices(path: str) -> str:
    return re.sub(r"\[\d+\]", "", path)


def _suggest_key(path: str) -> str | None:
    known = [*setting_types(), "regions", "drivers", "apps", "tcp"]
    for prefix, struct in (
        ("tcp", TcpConfig),
        ("apps", AppConfig),
        ("apps.services", ServiceConfig),
        ("apps.machines", MachineConfig),
        ("apps.checks", CheckConfig),
        ("apps.machine_tls", MachineTlsConfig),
        ("apps.replay_cache", ReplayCacheConfig),
        ("apps.compression", CompressionConfig),
        ("regions.*", RegionConfig),
        ("drivers.*", DriverConfig),
    ):
        known += [f"{prefix}.{key}" for key in struct.__struct_fields__]
    plain = re.sub(r"^(regions|drivers)\.[^.]+", r"\1.*", _without_indices(path))
    close: Sequence[str] = difflib.get_close_matches(plain, known, 1, 0.75)
    return close[0] if close else None
