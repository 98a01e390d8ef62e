"""`deploy`, `rollback`, `releases`, `scale` and `apply`, from the command to a real agent and back."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from isthmus.agent_role import AgentRole
from isthmus.cli import main
from isthmus.client import AdminClient
from isthmus.commands.deploy import _Screen, find_whoami
from isthmus.config import AdminConfig, AppConfig, Config, GossipConfig, MachineConfig, ProxyConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    Command = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
async def ports() -> AsyncIterator[list[int]]:
    """Ports that something listens on."""
    servers = [await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0) for _ in range(2)]
    yield [server.sockets[0].getsockname()[1] for server in servers]
    for server in servers:
        server.close()


@pytest.fixture
async def isthmus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ports: list[int]
) -> AsyncIterator[Command]:
    """Run a command against a node with one machine of `web`; returns its exit code and what it prints."""
    machine = MachineConfig(address=f"127.0.0.1:{ports[0]}", id="m1")
    role = AgentRole(
        Config(
            node="n1",
            data=str(tmp_path),
            region="ams",
            proxy=ProxyConfig(listen="127.0.0.1:1"),
            admin=AdminConfig(listen="127.0.0.1:0"),
            gossip=GossipConfig(listen="127.0.0.1:0"),
            apps=(AppConfig(name="web", hosts=("web.test",), machines=(machine,)),),
        )
    )
    admin = (await role.start())["admin"]

    async def run(*args: str) -> tuple[int, str, str]:
        code = await asyncio.to_thread(main, [*args, "--admin", admin])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    yield run
    await role.stop()


async def test_deploy_is_followed_to_its_end_and_listed(isthmus: Command, ports: list[int]) -> None:
    flags = ["--machine", f"127.0.0.1:{ports[1]}@gru", "--watch", "0", "--drain", "0"]
    code, out, _ = await isthmus("deploy", "web", "v2", *flags)
    assert code == 0, out
    lines = out.splitlines()
    first = "release 1 v2 of web: rolling, 1 machine in 1 step; it has no checks: an open port will do"
    assert lines[0].endswith(f"  {first}")
    assert lines[-2].endswith("  complete")
    assert lines[-1] == "release 1 of web is complete"
    assert await isthmus("releases", "wbe") == (0, "no releases of wbe yet\n", "")
    _, listed, _ = await isthmus("releases", "web", "--json")
    (release,) = json.loads(listed)
    assert (release["release"], release["status"], release["node"]) == ("v2", "complete", "n1")
    _, shown, _ = await isthmus("scale", "show", "--json")
    regions = {(row["region"], row["state"]): row["machines"] for row in json.loads(shown)}
    assert regions == {("ams", "cordoned"): 1, ("gru", "started"): 1}
    code, out, _ = await isthmus("deploy", "web", "--follow", "--json")
    assert (code, json.loads(out.splitlines()[0])["text"]) == (0, first)


async def test_deploy_that_fails_is_told_by_the_exit_code(isthmus: Command) -> None:
    code, out, _ = await isthmus(
        "deploy", "web", "--machine", "127.0.0.1:9", "--timeout", "0.2", "--drain", "0"
    )
    assert code == 1
    assert "release 1 of web is rolled back: not ready after 0.2 s" in out
    assert (await isthmus("rollback", "web")) == (
        1,
        "",
        "isthmus: app `web` has no earlier release that was complete\n",
    )
    assert (await isthmus("deploy", "web", "--cancel"))[2] == "isthmus: no deploy of `web` is running\n"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("deploy", "web", "v2", "--timeout", "-1"), "argument --timeout: `-1` is no number from 0 to 86400"),
        (("deploy", "web", "v2", "--watch", "nan"), "argument --watch: `nan` is no number from 0 to 86400"),
        (("rollback", "web", "x"), "argument VERSION: `x` is no number from 0 to 1000000000"),
        (("scale", "count", "1.5"), "argument N: `1.5` is no number from 0 to 1000"),
        (("explain", "http://a.test", "--ttl", "0"), "argument --ttl: `0` is no number from 1 to 3600"),
    ],
)
def test_number_out_of_range_is_told_by_its_flag(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err


async def test_deploy_that_another_node_has_begun_at_the_same_moment_is_told_as_given_up(
    isthmus: Command, ports: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    get = AdminClient.get

    def get_theirs(self: AdminClient, path: str) -> Any:
        return {**get(self, path), "node": "n2", "release": "v3"}

    monkeypatch.setattr(AdminClient, "get", get_theirs)
    code, _, err = await isthmus("deploy", "web", "v2", "--machine", f"127.0.0.1:{ports[1]}", "--drain", "0")
    assert code == 1
    assert "release 1 of web was begun on node n2 at the same moment, with v3; this one was given up" in err


def test_who_asks_is_told_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "jürgen")
    assert find_whoami().startswith("j?rgen@")


async def test_scale_says_what_is_left_for_a_person(isthmus: Command) -> None:
    assert await isthmus("scale", "count", "1") == (0, "nothing to do\n", "")
    code, out, err = await isthmus("scale", "count", "2", "--region", "ams,gru", "--dry-run")
    assert (code, out) == (1, "")
    assert "isthmus machine add web HOST:PORT --region gru" in err


async def test_fly_toml_is_applied_once_and_shows_what_it_changes(isthmus: Command, tmp_path: Path) -> None:
    file = tmp_path / "fly.toml"
    file.write_text(
        'app = "web"\n[http_service]\ninternal_port = 3000\nforce_https = true\n[vm]\nmemory = "1gb"\n',
        "utf-8",
    )
    code, out, err = await isthmus("apply", str(file), "--dry-run")
    assert code == 0
    assert (
        err == f"{file}:5: vm: not honoured: isthmus neither builds nor runs images: it routes to machines\n"
    )
    changes = ["service: force_https: null -> true", "service: internal_port: null -> 3000"]
    assert out.splitlines() == [*changes, "app web would be changed"]
    assert (await isthmus("apply", str(file)))[1].splitlines() == [*changes, "app web changed"]
    assert (await isthmus("apply", str(file)))[1] == f"app web is as {file} says\n"
    _, out, _ = await isthmus("apply", str(file), "--app", "other", "--json")
    assert json.loads(out)["notes"] == [
        {
            "line": 5,
            "key": "vm",
            "text": "not honoured: isthmus neither builds nor runs images: it routes to machines",
        }
    ]
    _, out, _ = await isthmus("apply", str(file), "--app", "third", "--host", "third.test")
    assert "no host" not in out
    _, out, _ = await isthmus("apply", str(file), "--app", "other")
    assert out.splitlines()[-1] == "no host leads to other yet: isthmus apply --host HOST"


async def test_file_that_makes_no_sense_is_refused_with_its_line(isthmus: Command, tmp_path: Path) -> None:
    file = tmp_path / "fly.toml"
    assert (await isthmus("apply", str(file)))[2].startswith(f"isthmus: cannot read {file}")
    file.write_text('app = "web"\n[http_service]\ninternal_port = "x"\n', "utf-8")
    code, _, err = await isthmus("apply", str(file))
    assert (code, err) == (1, f"isthmus: {file}:3: http_service.internal_port: must be int\n")


def test_terminal_is_told_what_is_waited_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    _Screen(is_json=False).show({"status": "rolling back", "batch": 0, "batches": 3, "stage": "known"})
    assert capsys.readouterr().out.endswith("… step 1/3, going back: until all nodes know (0 s)")
