"""The documentation names every setting, metric, path and error code, and shows the real defaults."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from isthmus.admin.deploys import DeployRoutes
from isthmus.admin.explain import ExplainRoutes
from isthmus.admin.facts import FactRoutes
from isthmus.admin.keys import KeyRoutes
from isthmus.admin.lifecycle import LifecycleRoutes
from isthmus.admin.metrics import known_metrics
from isthmus.admin.rollouts import RolloutRoutes
from isthmus.admin.server import AdminServer
from isthmus.admin.staging import StagingRoutes
from isthmus.config import (
    AdminConfig,
    AppConfig,
    CheckConfig,
    CompressionConfig,
    Config,
    MachineConfig,
    MachineTlsConfig,
    RegionConfig,
    ReplayCacheConfig,
    ServiceConfig,
    TcpConfig,
)
from isthmus.config_machines import DriverConfig
from isthmus.config_sources import default_data_dir, setting_types
from isthmus.doctor.rules import RULES
from proxy.core.errors import ERRORS
from routing.geo import BUILT_IN

DOCS = Path(__file__).resolve().parents[2] / "docs"

# What depends on the machine is shown in words.
SHOWN_IN_WORDS = {"node"}

TABLES = {
    "tcp": TcpConfig,
    "apps": AppConfig,
    "apps.services": ServiceConfig,
    "apps.machines": MachineConfig,
    "apps.checks": CheckConfig,
    "apps.machine_tls": MachineTlsConfig,
    "apps.replay_cache": ReplayCacheConfig,
    "apps.compression": CompressionConfig,
    "regions.*": RegionConfig,
    "drivers.*": DriverConfig,
}


def text_of(page: str) -> str:
    return (DOCS / page).read_text("utf-8")


def test_every_built_in_region_is_listed() -> None:
    part = text_of("configuration.md").partition("## `[regions.<code>]`")[2].partition("\n## ")[0]
    assert set(re.findall(r"`([a-z]{3})`", part)) == set(BUILT_IN)


def rows(page: str) -> dict[str, list[str]]:
    """The cells after the first one of each table row that begins with a name in backticks, by that name.

    Below a heading that shows a table of the configuration file, names are those of its keys.
    """
    found: dict[str, list[str]] = {}
    prefix = ""
    for line in text_of(page).splitlines():
        heading = re.match(r"#+ (?:`\[+([^\]]+)\]+`)?", line)
        if heading is not None:
            table = (heading[1] or "").replace("<code>", "*").replace("<name>", "*")
            prefix = f"{table}." if table in TABLES else ""
        row = re.match(r"\|\s*`([^`]+)`\s*\|(.*)\|\s*$", line)
        if row is not None:
            name = prefix + row[1]
            assert name not in found, f"{page} has two rows for `{name}`"
            found[name] = [cell.strip() for cell in row[2].split("|")]
    return found


def defaults_of(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {
        field.name: field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        for field in msgspec.structs.fields(struct)
    }


def settings() -> dict[str, Any]:
    """The default of every setting, by dotted name; NODEFAULT where one has to be given."""
    found: dict[str, Any] = {}
    sections = typing.get_type_hints(Config)
    for name in setting_types():
        section, dot, key = name.partition(".")
        found[name] = defaults_of(sections[section] if dot else Config)[key if dot else name]
    for prefix, struct in TABLES.items():
        for key, default in defaults_of(struct).items():
            found[f"{prefix}.{key}"] = default
    found["data"] = str(default_data_dir({})) if found["data"] is msgspec.NODEFAULT else found["data"]
    return found


def is_shown(default: Any, cell: str) -> bool:
    """True when the cell says what the default is; what is made up when nothing is said is told in words."""
    if default is msgspec.NODEFAULT:
        return cell == "required"
    if default in (None, ()):
        return cell == "none"
    if default == "":
        return bool(cell) and "`" not in cell
    if isinstance(default, bool):
        return cell == f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return cell == ", ".join(f"`{item}`" for item in default)
    return cell == f"`{default}`"


def documented_settings() -> dict[str, str]:
    """The default cell of each setting in configuration.md, by the name that it has there."""
    return {name: cells[0] for name, cells in rows("configuration.md").items()}


@pytest.mark.parametrize("name", settings())
def test_setting_is_documented_with_its_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    told = documented_settings()
    assert name in told, f"docs/configuration.md has no row for `{name}`"
    if name not in SHOWN_IN_WORDS:
        default = settings()[name]
        assert is_shown(default, told[name]), f"the default of `{name}` is {default!r}"


def test_no_setting_is_documented_that_is_none() -> None:
    assert set(documented_settings()) <= set(settings())


@pytest.mark.parametrize("name", known_metrics())
def test_metric_is_documented_with_its_type(name: str) -> None:
    told = rows("metrics.md")
    assert name in told, f"docs/metrics.md has no row for `{name}`"
    assert told[name][0] == known_metrics()[name][0]


def test_no_metric_is_documented_that_is_none() -> None:
    assert set(rows("metrics.md")) <= set(known_metrics())


class _AnyView:
    """Stands in for the views, whose names are all that the table of routes needs."""

    def __getattr__(self, name: str) -> Any:
        return lambda: None


def paths() -> set[str]:
    parts = {
        "registry": None,
        "samples": list,
        "replica": None,
        "subscriptions": None,
        "keys": KeyRoutes(None),
        "lifecycle": LifecycleRoutes(None),
        "others": [
            ExplainRoutes(None, None, None, None, None),
            FactRoutes(None, None, None, None, None, None, None, None),
            DeployRoutes(None, None, None, None),
            RolloutRoutes(None),
            StagingRoutes(None, list),
        ],
    }
    server = AdminServer(AdminConfig(), _AnyView(), **parts)
    return {f"{route.method} {route.path}" for route in server._routes()}


@pytest.mark.parametrize("path", sorted(paths()))
def test_path_of_the_admin_api_is_documented(path: str) -> None:
    assert path in rows("admin-api.md"), f"docs/admin-api.md has no row for `{path}`"


def test_no_path_is_documented_that_is_none() -> None:
    assert set(rows("admin-api.md")) <= paths()


@pytest.mark.parametrize("code", ERRORS)
def test_error_code_is_documented_with_its_status(code: str) -> None:
    told = rows("errors.md")
    assert code in told, f"docs/errors.md has no row for `{code}`"
    assert told[code][0] == str(ERRORS[code][0])


def test_no_error_code_is_documented_that_is_none() -> None:
    assert set(rows("errors.md")) <= set(ERRORS)


@pytest.mark.parametrize("page", sorted(page.name for page in DOCS.glob("*.md")))
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", text_of(page)):
        assert (DOCS / target).exists(), f"docs/{page} links to {target}"


@pytest.mark.parametrize("name", [rule.name for rule in RULES])
def test_rule_of_the_doctor_is_documented(name: str) -> None:
    assert name in rows("doctor.md"), f"docs/doctor.md has no row for `{name}`"


def test_no_rule_is_documented_that_is_none() -> None:
    assert set(rows("doctor.md")) <= {rule.name for rule in RULES}
