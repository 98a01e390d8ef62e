"""Agents with 1,000,000 rows: a snapshot to a new node, and the memory of a node among 1000 members.

Decides what the other side is. For the snapshot it is an agent, in a process of its own; for the memory a
crowd: one process that answers the probes of all other members, and passes on their heartbeats. Frames are
sealed and go over loopback. Invariant: the new node has all rows in the end, and the node in the crowd all
members, or it all fails.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from replication.agent import Agent
from replication.core.change import Commit
from replication.core.clock import SiteId, hlc_from_ms
from replication.core.member import MemberInfo, MemberState, Update
from replication.core.vivaldi import DIMENSIONS, Coordinate
from replication.core.wire import (
    Ack,
    Beats,
    DigestAsk,
    Heartbeat,
    Hello,
    Members,
    Ping,
    StatesAsk,
    StreamAck,
    StreamPing,
    SyncBusy,
    SyncOpen,
    SyncState,
    Whereabouts,
    decode_datagram,
    decode_frame,
    encode,
)
from replication.seal import make_seal
from replication.settings import AgentSettings, parse_address
from replication.transport import Link, Transport

from .million import ROWS, make_sites, read_memory_mb
from .ours import make_schema, wall_ms

KEY = bytes(range(32))
CLUSTER = "isthmus"
TIMEOUT_S = 600.0  # a machine that is busy with other things takes that long
# In which the node probes, syncs, compares tables and hears a thousand heartbeats a second.
CROWDED_S = 20.0


def measure_agents(folder: Path) -> dict[str, float]:
    """Return seconds and MB by what was done, with the source that is in the folder."""
    found: dict[str, float] = {}
    with _start("hold", folder) as holder:
        address = _read_line(holder)
        with _start("join", folder, address) as joiner:
            found |= json.loads(_read_line(joiner))
        found |= _end(holder)
    with _start("stand", folder) as node, _start("crowd", folder, _read_line(node)) as crowd:
        time.sleep(CROWDED_S)
        found |= _end(node)
        crowd.kill()
    return found


def _start(side: str, folder: Path, *values: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", __name__, side, str(folder), *values]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None, "it is a pipe"
    line = process.stdout.readline().strip()
    if not line:
        raise RuntimeError("a side has failed")
    return line


def _end(process: subprocess.Popen[str]) -> dict[str, float]:
    """Let a side end; return what it measured."""
    assert process.stdin is not None, "it is a pipe"
    process.stdin.close()
    figures: dict[str, float] = json.loads(_read_line(process))
    return figures


async def _wait_for_end() -> None:
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def hold(folder: Path) -> dict[str, float]:
    """Have all rows, until told to end."""
    agent = Agent(_make_settings(folder, "source"), make_schema("row"), on_commit=lambda _: None)
    await agent.start()
    try:
        print(f"{agent.address[0]}:{agent.address[1]}", flush=True)
        await _wait_for_end()
    finally:
        await agent.stop()
    return {"holder_peak_mb": read_memory_mb("VmHWM"), "holder_cpu_s": time.process_time()}


async def join(folder: Path, address: str) -> dict[str, float]:
    """Start as a new node; end when all rows are here."""
    arrived = asyncio.Event()

    def handle_commit(commit: Commit) -> None:
        if commit.reload or commit.changes:
            arrived.set()

    started = time.monotonic()
    agent = Agent(_make_settings(folder, "joiner", address), make_schema("row"), on_commit=handle_commit)
    await agent.start()
    try:
        await asyncio.wait_for(arrived.wait(), TIMEOUT_S)
        seconds = time.monotonic() - started
        found = await agent.query("SELECT count(*) FROM items")
        if found.rows[0][0] != ROWS:
            raise RuntimeError(f"{found.rows[0][0]} rows have arrived")
        return {
            "join_s": seconds,
            "join_cpu_s": time.process_time(),
            "join_peak_mb": read_memory_mb("VmHWM"),
        }
    finally:
        await agent.stop()


async def stand(folder: Path) -> dict[str, float]:
    """Have all rows and all members, until told to end."""
    agent = Agent(_make_settings(folder, "source"), make_schema("row"), on_commit=lambda _: None)
    await agent.start()
    try:
        print(f"{agent.address[0]}:{agent.address[1]}", flush=True)
        await _wait_for_end()
        members = agent.members()
        alive = sum(member.state == "alive" for member in members)
        if alive < len(make_sites()):
            raise RuntimeError(f"of {len(members)} members, {alive} are alive")
        return {"stand_mb": read_memory_mb("VmRSS"), "stand_peak_mb": read_memory_mb("VmHWM")}
    finally:
        await agent.stop()


def _make_settings(folder: Path, name: str, *join: str) -> AgentSettings:
    return AgentSettings(name, folder / f"{name}.db", bind=("127.0.0.1", 0), join=join, keys=(KEY,))


class _Crowd:
    """All members but one, at one address."""

    def __init__(self) -> None:
        self.transport = Transport(
            ("127.0.0.1", 0),
            make_seal((KEY,), CLUSTER),
            lambda: Hello(CLUSTER, self._members[0], lasting=True),
            self,
            handshake_timeout_s=5,
        )
        self._members: list[MemberInfo] = []

    async def start(self) -> None:
        """Take a port, and names."""
        await self.transport.bind()
        self._members = [
            MemberInfo(site, f"node-{number}", *self.transport.address, 1)
            for number, site in enumerate(make_sites())
        ]
        await self.transport.serve()

    def tell_members(self, link: Link) -> None:
        """Tell who there is, and where."""
        updates = tuple(Update(info, MemberState.ALIVE) for info in self._members)
        place = Coordinate((30.0,) * DIMENSIONS, 1.0, 0.3)
        link.send(encode(Members(updates, tuple(Whereabouts(info.site, place, 5) for info in self._members))))

    def tell_beats(self, link: Link) -> None:
        """Pass on a heartbeat of each."""
        hlc = hlc_from_ms(wall_ms())
        link.send(encode(Beats(tuple(Heartbeat(info.site, 1, hlc, hlc, 0) for info in self._members))))

    def handle_datagram(self, data: bytes) -> None:
        """Answer a probe as whoever it is for."""
        message = decode_datagram(data)
        if isinstance(message, Ping):
            info = next((info for info in self._members if info.site == message.target), self._members[0])
            self.transport.send_datagram(message.sender.address, encode(Ack(message.number, info)))

    def handle_frame(self, link: Link, data: bytes) -> None:
        """Answer that there is nothing new."""
        message = decode_frame(data)
        if isinstance(message, StreamPing):
            link.send(encode(StreamAck(message.number)))
        elif isinstance(message, SyncOpen):
            seen: dict[SiteId, tuple[tuple[int, int], ...]] = {info.site: ((1, 1),) for info in self._members}
            link.send(encode(SyncState(message.session, seen, {})))
        elif isinstance(message, DigestAsk | StatesAsk):
            link.send(encode(SyncBusy(message.session)))

    def handle_self(self, info: MemberInfo) -> None:
        """Do nothing: nobody has these sites but us."""

    def handle_link_up(self, link: Link) -> None:
        """Do nothing: who dials us is told by the link that we dialled."""

    def handle_link_down(self, link: Link) -> None:
        """Do nothing."""


async def crowd(_folder: Path, address: str) -> dict[str, float]:
    """Be all the others, until killed."""
    everybody = _Crowd()
    await everybody.start()
    link = await everybody.transport.connect(parse_address(address), lasting=True)
    while True:
        everybody.tell_members(link)
        everybody.tell_beats(link)
        await asyncio.sleep(1)


SIDES: dict[str, Callable[..., Awaitable[dict[str, float]]]] = {
    side.__name__: side for side in (hold, join, stand, crowd)
}


async def _run(side: str, folder: Path, values: list[str]) -> dict[str, float]:
    return await SIDES[side](folder, *values)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as side_runner:
        print(json.dumps(side_runner.run(_run(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))), flush=True)
