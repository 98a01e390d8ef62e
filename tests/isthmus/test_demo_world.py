from __future__ import annotations

import os
import signal
import socket
from typing import TYPE_CHECKING

import pytest

from isthmus.config import ConfigError
from isthmus.config_sources import load_config
from isthmus.demo import world as world_module
from isthmus.demo.world import (
    HOST,
    MACHINES_PER_REGION,
    REGIONS,
    World,
    node_config,
    plan_places,
    refuse_taken_ports,
)
from routing import geo
from tests.isthmus.waiting import eventually

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

# Only written down, never bound.
BASE = 8080


def addresses(base: int) -> list[str]:
    return [
        address
        for place in plan_places(base)
        for address in (place.proxy, place.admin, place.gossip, *(address for _, address in place.machines))
    ]


def test_places_share_no_address_and_keep_to_a_range_of_ports() -> None:
    found = addresses(BASE)
    assert len(set(found)) == len(found) == len(REGIONS) * (3 + MACHINES_PER_REGION)
    ports = [int(address.removeprefix(f"{HOST}:")) for address in found]
    assert min(ports) > BASE
    assert max(ports) < BASE + 100
    assert all(region in geo.BUILT_IN for region in REGIONS)


def test_files_of_the_nodes_are_valid_and_join_each_other(tmp_path: Path) -> None:
    places = plan_places(BASE)
    for place in places:
        file = tmp_path / f"{place.region}.toml"
        file.write_text(node_config(place, places, tmp_path / place.region), "utf-8")
        config = load_config(file, {}, {})
        assert (config.node, config.region) == (place.region, place.region)
        assert config.proxy.listen == place.proxy
        assert set(config.gossip.join) == {other.gossip for other in places} - {place.gossip}
        (app,) = config.apps
        assert [(machine.id, machine.address) for machine in app.machines] == list(place.machines)


def free_base() -> int:
    """A base whose ports are all free now."""
    for base in range(20_000, 30_000, 100):
        try:
            refuse_taken_ports(plan_places(base))
        except ConfigError:
            continue
        return base
    pytest.skip("no range of ports is free")


def test_taken_port_is_named_with_the_way_out() -> None:
    base = free_base()
    taken = base + 32
    with socket.create_server((HOST, taken)), pytest.raises(ConfigError) as caught:
        refuse_taken_ports(plan_places(base))
    assert f"port {taken} is taken by another program" in str(caught.value)
    assert "--base-port 9500" in str(caught.value)
    assert "make demo BASE_PORT=" in str(caught.value)


async def test_taken_port_keeps_the_world_from_beginning(tmp_path: Path) -> None:
    base = free_base()
    world = World(base, tmp_path)
    with (
        socket.create_server((HOST, base + 1)),
        pytest.raises(ConfigError, match=f"port {base + 1} is taken"),
    ):
        await world.start()
    assert world._processes == []
    await world.stop()


PROGRAM = """
import signal, sys, time
if sys.argv[1] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
elif sys.argv[1] == "ends":
    sys.exit("said before the end")
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that the world can start as one of its processes."""
    (tmp_path / "program_of_the_test.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "program_of_the_test"


def is_running(process: asyncio.subprocess.Process) -> bool:
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_stop_ends_everything_also_what_does_not_want_to(
    tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world_module, "STOP_S", 0.2)
    world = World(BASE, tmp_path)
    for name in ("willing", "stubborn", "ends"):
        await world._spawn(name, program, name)
    processes = [process for _, process in world._processes]

    def said(name: str) -> str:
        return world.log_file(name).read_text()

    await eventually("all have begun", lambda: "ready" in said("willing") and "ready" in said("stubborn"))
    await eventually("one has ended by itself", lambda: world.ended() == "ends")
    assert said("ends") == "said before the end\n"
    await world.stop()
    assert [process.returncode for process in processes] == [-signal.SIGTERM, -signal.SIGKILL, 1]
    assert not any(map(is_running, processes))


async def test_stop_after_a_start_that_was_cut_short_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(free_base(), tmp_path)
    (tmp_path / REGIONS[1]).write_bytes(b"")  # the directory of the second node cannot be made
    with pytest.raises(FileExistsError):
        await world.start()
    processes = [process for _, process in world._processes]
    assert len(processes) == len(REGIONS) * MACHINES_PER_REGION + 1
    await world.stop()
    assert not any(map(is_running, processes))
    assert all(process.returncode is not None for process in processes)
