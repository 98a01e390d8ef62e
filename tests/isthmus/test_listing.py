"""What the command line prints of a node, from the command to the table."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING

import pytest

from isthmus import __version__
from isthmus.agent_role import AgentRole
from isthmus.cli import main
from isthmus.commands.listing import format_table
from isthmus.config import (
    AdminConfig,
    AppConfig,
    CheckConfig,
    Config,
    GossipConfig,
    MachineConfig,
    ProxyConfig,
)
from tests.isthmus.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    Command = Callable[..., Awaitable[str]]

WEB = AppConfig(
    name="web",
    hosts=("web.test",),
    machines=(
        MachineConfig(address="127.0.0.1:1", id="m1"),
        MachineConfig(address="[::1]:1", id="m2", region="gru"),
    ),
    checks=(CheckConfig(type="tcp", name="port", grace_ms=600_000),),
)


@pytest.fixture
async def role(tmp_path: Path) -> AsyncIterator[AgentRole]:
    role = AgentRole(
        Config(
            node="n1",
            data=str(tmp_path),
            region="ams",
            proxy=ProxyConfig(listen="127.0.0.1:8080"),
            admin=AdminConfig(listen="127.0.0.1:0"),
            gossip=GossipConfig(listen="127.0.0.1:0"),
            apps=(WEB,),
        )
    )
    yield role
    await role.stop()


@pytest.fixture
async def isthmus(role: AgentRole, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command against the node and return what it prints."""
    admin = (await role.start())["admin"]

    async def run(*args: str) -> str:
        assert await asyncio.to_thread(main, [*args, "--admin", admin]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    async def is_loaded() -> bool:
        return "m2" in await run("routes")

    await eventually("the table is loaded", is_loaded)
    return run


def words(printed: str) -> list[list[str]]:
    return [line.split() for line in printed.splitlines()]


async def test_routes_are_a_table_with_the_nearest_machine_first(isthmus: Command) -> None:
    assert words(await isthmus("routes")) == [
        ["HOST", "PATH", "APP", "MACHINE", "REGION", "ADDRESS"],
        ["web.test", "/", "web", "m1", "ams", "127.0.0.1:1"],
        ["web.test", "/", "web", "m2", "gru", "[::1]:1"],
    ]


async def test_machines_show_state_checks_and_verdict(isthmus: Command, role: AgentRole) -> None:
    result = "INSERT INTO checks (machine, name, node, status) VALUES ('m1', 'port', 'n1', 'critical')"
    await role._agent.execute(
        [(result, ()), ("UPDATE machines SET cordoned = 1, version = 7 WHERE id = 'm2'", ())]
    )

    async def machines() -> str:
        printed = await isthmus("machines")
        return printed if "critical" in printed else ""

    _, m1, m2 = (await eventually("check is shown", machines)).splitlines()
    assert (
        " ".join(m1.split()) == "m1 web - ams n1 127.0.0.1:1 started - port critical unhealthy: port critical"
    )
    assert " ".join(m2.split()) == "m2 web 7 gru n1 [::1]:1 started cordoned - - cordoned"


async def test_machines_show_where_they_are_to_go_and_what_is_in_the_way(
    isthmus: Command, role: AgentRole
) -> None:
    goal = "INSERT INTO goals (machine, state) VALUES ('m1', 'started')"
    change = (
        "UPDATE machines SET driver = 'far', state = 'stopped', problem = 'exited with 3' WHERE id = 'm1'"
    )
    await role._agent.execute([(goal, ()), (change, ())])
    role._feed.failing = {"worker-0/1": (("m2", 3, 2.5),), "worker-1/2": (("m2", 1, 0.0),)}
    _, m1, m2 = (await isthmus("machines")).splitlines()
    assert "stopped (to be started)" in m1
    assert m1.endswith("not started: stopped; exited with 3")
    assert m2.endswith("; 3 failures in a row, left out by 1 worker here")
    role._feed.failing = {"worker-1/2": (("m2", 1, 0.0),)}
    _, _, m2 = (await isthmus("machines")).splitlines()
    assert m2.endswith("; 1 failure in a row, to be tried again")


async def test_checks_show_status_and_last_output(isthmus: Command, role: AgentRole) -> None:
    result = (
        "INSERT INTO checks (machine, name, node, status, output, updated_ms)"
        " VALUES ('m1', 'port', 'n2', 'critical', '503: no', 1)"
    )
    await role._agent.execute([(result, ())])
    header, line = words(await isthmus("checks"))
    assert header == ["MACHINE", "CHECK", "STATUS", "SINCE", "BY", "WHEN", "OUTPUT"]
    assert line[:5] == ["m1", "port", "critical", "-", "n2"]
    assert line[-3:] == ["ago", "503:", "no"]


async def test_nodes_show_this_one_as_itself(isthmus: Command) -> None:
    _, node = words(await isthmus("nodes"))
    assert node[:4] == ["n1", "ams", "alive", "self"]
    assert node[-3:-1] == ["127.0.0.1:8080", "isthmus"]


async def test_regions_are_in_order_of_round_trips(isthmus: Command) -> None:
    _, here, there = words(await isthmus("regions"))
    assert here == ["1", "ams", "Amsterdam,", "Netherlands", "0.0", "ms", "here", "1", "1/1"]
    assert (there[0], there[1], there[-3:]) == ("2", "gru", ["distance", "0", "1/1"])


async def test_apps_show_how_many_machines_are_routable(isthmus: Command) -> None:
    assert words(await isthmus("apps"))[1] == ["web", "web.test", "2/2"]


@pytest.mark.parametrize("listing", ["routes", "machines", "nodes", "regions", "apps", "status"])
async def test_json_is_what_the_api_says(isthmus: Command, listing: str) -> None:
    assert json.loads(await isthmus(listing, "--json"))


async def test_status_says_in_a_few_lines_how_the_node_fares(isthmus: Command, role: AgentRole) -> None:
    await role._agent.execute([("INSERT INTO services (app, port, soft_limit) VALUES ('web', 1, -1)", ())])
    printed = await isthmus("status")
    node, *rest = printed.splitlines()
    assert re.fullmatch(rf"node      n1, region ams, isthmus {__version__}, up \d\.\d s", node)
    assert rest[:-1] == [
        "workers   0 of 1 follow the table",
        "nodes     1 of 1 alive",
        "table     no other node writes to it",
        "serves    1 app, 2 of 2 machines routable",
        "problems  1 worker of 1 on an old table, or not running",
    ]
    assert rest[-1].startswith("          a row of services cannot be used: web, 1: ")


async def test_apps_and_machines_are_changed_by_command(isthmus: Command) -> None:
    assert (
        await isthmus("app", "add", "api", "--host", "api.test", "--machine", "127.0.0.1:5", "--check", "/up")
        != ""
    )
    assert (
        await isthmus("machine", "add", "api", "127.0.0.1:6", "--id", "m6", "--region", "syd")
        == "machine m6\n"
    )
    for action in ("stop", "start", "cordon", "uncordon"):
        assert await isthmus("machine", action, "m6") == f"machine m6: {action}\n"
    assert await isthmus("machine", "remove", "m6") == "machine m6 removed\n"
    assert await isthmus("app", "remove", "api") == "app api removed\n"

    async def is_gone() -> bool:
        return "api" not in await isthmus("apps")

    await eventually("it is gone", is_gone)


async def test_primary_region_that_nobody_knows_is_set_with_a_warning(
    isthmus: Command, role: AgentRole, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert await isthmus("app", "set", "web", "--primary-region", "gru") == "app web changed\n"
    file = tmp_path / "fly.toml"
    file.write_text('app = "web"\nprimary_region = "moon-base"\n[http_service]\ninternal_port = 1\n', "utf-8")
    for words in (
        ("app", "set", "web", "--primary-region", "moon-base"),
        ("app", "add", "web", "--primary-region", "moon-base"),
        ("apply", str(file), "--dry-run"),
    ):
        assert await asyncio.to_thread(main, [*words, "--admin", role._admin.address]) == 0
        told = capsys.readouterr().err
        assert told.startswith("isthmus: warning: primary_region: unknown region `moon-base`")
        assert told.count("\n") == 1


async def test_app_whose_machines_are_all_out_says_so(isthmus: Command) -> None:
    for machine in ("m1", "m2"):
        await isthmus("machine", "stop", machine)

    async def is_out() -> bool:
        return "none routable" in await isthmus("routes")

    await eventually("none routable", is_out)


async def test_empty_node_says_that_there_is_nothing_yet(isthmus: Command) -> None:
    await isthmus("app", "remove", "web")

    async def is_empty() -> bool:
        return await isthmus("apps") == "no apps yet\n"

    await eventually("nothing is left", is_empty)
    for listing in ("routes", "machines"):
        assert await isthmus(listing) == f"no {listing} yet\n"


def test_failure_is_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["routes", "--data", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("isthmus: no isthmus runs with the data directory")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("args", [[], ["fly"], ["machine", "explode", "m1"], ["routes", "--colour"]])
def test_wrong_usage_is_exit_code_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "usage: isthmus" in told
    assert "--help`" in told


@pytest.mark.parametrize(
    ("args", "told"),
    [(["machines"], "Show every machine."), (["app", "remove"], "Remove an app and its machines.")],
)
def test_help_of_a_verb_says_what_it_does(
    args: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*args, "--help"])
    assert told in capsys.readouterr().out


def test_columns_are_aligned_and_lines_have_no_trailing_space() -> None:
    assert (
        format_table(("A", "LONG"), [("wide cell", ""), ("x", "y")])
        == "A          LONG\nwide cell\nx          y"
    )


def test_nothing_in_a_cell_drives_the_terminal() -> None:
    table = format_table(("NAME",), [("a\x1b[2Jb\nc\x9b",)])
    assert table.splitlines() == ["NAME", "a\\x1b[2Jb\\nc\\x9b"]
