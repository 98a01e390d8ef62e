"""Kill a writer again and again at random moments, and look each time at what it left.

Decides when the writer dies and what must hold then; the writer itself knows nothing of it. Invariant: what
is checked is a copy of the file as the kill left it, and the next writer opens the file itself.
"""

from __future__ import annotations

import asyncio
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import msgpack

from replication.agent import Agent
from replication.core.clock import SiteId
from replication.settings import AgentSettings
from replication.store import Store
from tests.chaos.world import PUT_SHARED, PUT_THIRD, SCHEMA
from tests.chaos.writer import compute_hash, wall_ms

ROOT = Path(__file__).resolve().parents[2]
# An agent has sockets to open before it writes, and what it does is done by a database too.
MODES = {"store": 12, "database": 4, "agent": 1}
MOMENTS = {"open": 3, "load": 6, "large": 2, "merge": 1, "checkpoint": 3, "prune": 3, "snapshot": 3}
ALL = 1 << 39
CHECK_WHOLE_EVERY = 10
DEADLINE_S = 30.0


class Writer:
    """One life of the writer, from before it has a task to its death."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "writer.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.writer"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._said = b""

    def begin(self, task: Path) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{task}\n".encode())
        self.process.stdin.flush()

    def listen(self, duration_s: float, until: bytes | None = None) -> bool:
        """Take in what it says for so long, or until it says that; return whether it did."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + duration_s
        while until is None or until not in self._said:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            if select.select([self.process.stdout], [], [], remaining)[0]:
                data = os.read(self.process.stdout.fileno(), 1 << 16)
                if not data:
                    return False
                self._said += data
        return True

    def kill(self) -> list[list[str]]:
        """End its life, which it has not ended itself, and return all that it said."""
        assert self.process.stdout is not None
        self.process.kill()
        self._said += self.process.stdout.read()
        assert self.process.wait() == -signal.SIGKILL, self.log.read_text("utf-8")
        self.close()
        return [line.split() for line in self._said.decode().splitlines()]

    def close(self) -> None:
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self.process.wait()


class Acknowledged:
    """What the writers of all rounds were told, and what their versions were seen to hold."""

    def __init__(self) -> None:
        self.site = ""
        self.hashes: dict[int, str] = {}  # of each own version that was told or read
        self.head = 0
        self.small: dict[int, int] = {}
        self.large = 0
        self.merged: set[int] = set()
        self.snapshot_head = 0

    def take(self, said: list[list[str]]) -> None:
        for what, *words in said:
            match what:
                case "open":
                    assert self.site in ("", words[0]), "the file has become another site"
                    self.site = words[0]
                case "own":
                    self.note_version(int(words[0]), words[1])
                    self.head = max(self.head, int(words[0]))
                case "small":
                    key, n = map(int, words)
                    self.small[key] = max(self.small.get(key, 0), n)
                case "large":
                    self.large = max(self.large, int(words[0]))
                case "merged":
                    self.merged.update(map(int, words))
                case "snapshot":
                    self.snapshot_head = max(self.snapshot_head, int(words[0]))

    def note_version(self, version: int, hashed: str) -> None:
        known = self.hashes.setdefault(version, hashed)
        assert known == hashed, f"version {version} was used twice"


class Killing:
    """Rounds of one seed on one file.

    `source` is another site, whose changesets the writer merges; `third` one that it gets a snapshot of;
    `replica` follows the writer by its log alone.
    """

    def __init__(self, directory: Path, seed: int) -> None:
        self.kills: Counter[str] = Counter()
        self.acknowledged = Acknowledged()
        self._directory = directory
        self._path = directory / "writer.db"
        self._rng = random.Random(seed)
        self._round = 0
        self._source = Store.open(":memory:", SCHEMA, site=SiteId(b"s" * 16))
        self._third = Store.open(":memory:", SCHEMA, site=SiteId(b"t" * 16))
        self._replica = Store.open(":memory:", SCHEMA, site=SiteId(b"r" * 16))
        self._next = Writer(directory)
        self._peer = ""  # address of an agent, while there is one

    def close(self) -> None:
        self._next.close()
        for store in (self._source, self._third, self._replica):
            store.close()

    async def run(self, rounds: int) -> None:
        """Kill so many writers; raises AssertionError for what must not be."""
        settings = AgentSettings("peer", self._directory / "peer.db", bind=("127.0.0.1", 0))
        peer = Agent(settings, SCHEMA, on_commit=lambda _: None)
        await peer.start()
        self._peer = "{}:{}".format(*peer.address)
        try:
            for _ in range(rounds):
                await asyncio.to_thread(self._run_round)
            await self._compare_with(peer)
        finally:
            await peer.stop()

    def _run_round(self) -> None:
        self._round += 1
        (mode,) = self._rng.choices(list(MODES), list(MODES.values()))
        (moment,) = self._rng.choices(list(MOMENTS), list(MOMENTS.values()))
        writer, self._next = self._next, Writer(self._directory)
        try:
            writer.begin(self._write_task(mode))
            if moment == "open":
                writer.listen(self._rng.uniform(0, 0.02))
            else:
                opened = writer.listen(DEADLINE_S, b"open")
                assert opened, writer.log.read_text("utf-8")
                if moment == "load" or not writer.listen(0.3, f"at {moment}".encode()):
                    writer.listen(self._rng.uniform(0, 0.1))
                else:
                    writer.listen(self._rng.uniform(0, 0.01))
            said = writer.kill()
        finally:
            writer.close()
        self.kills[_describe_moment(said)] += 1
        self.acknowledged.take(said)
        self._check()

    def _write_task(self, mode: str) -> Path:
        """Make something new for the writer to merge, and tell it what to do."""
        now = wall_ms()
        for _ in range(30):
            values = (self._rng.randrange(50), self._round, self._rng.random())
            self._source.execute([(PUT_SHARED, values)], now)
        keys = self._rng.sample(range(1500), 100)
        self._third.execute([(PUT_THIRD, (key, self._round)) for key in keys], now)
        head = self._source.seen()[self._source.site].head
        own = self._replica.seen().get(SiteId(bytes.fromhex(self.acknowledged.site)))
        task: dict[str, Any] = {
            "mode": mode,
            "path": str(self._path),
            "seed": self._rng.getrandbits(32),
            "inbox_site": self._source.site,
            "inbox": [
                (item.version, item.payload)
                for item in self._source.read_log(self._source.site, head - 100, head, 1 << 30)
            ],
            "snapshot": list(self._third.snapshot(4096)),
            "snapshot_head": self._third.seen()[self._third.site].head,
            "prune_below": own.head - 5 if own else 0,
            "peer": self._peer,
        }
        file = self._directory / "task"
        file.write_bytes(msgpack.packb(task))
        return file

    def _check(self) -> None:
        if not self.acknowledged.site:
            return  # killed before there was anything
        copy = self._directory / "copy.db"
        for suffix in ("", "-wal"):
            Path(f"{copy}{suffix}").unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                shutil.copyfile(f"{self._path}{suffix}", f"{copy}{suffix}")
        site = SiteId(bytes.fromhex(self.acknowledged.site))
        with closing(Store.open(copy, SCHEMA, site=site)) as store:
            if self._round % CHECK_WHOLE_EVERY == 0:
                assert store.connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            self._check_versions(store)
            self._check_rows(store)
            self._follow(store)

    def _check_versions(self, store: Store) -> None:
        told = self.acknowledged
        own = store.seen().get(store.site)
        if own is None:
            assert told.head == 0
            return
        assert list(own) == [(1, own.head)], "a version was skipped"
        assert own.head >= told.head, "an acknowledged version is lost"
        logged = store.read_log(store.site, 1, ALL, 1 << 40)
        versions = [item.version for item in logged]
        assert versions == list(range(own.head + 1 - len(logged), own.head + 1))
        followed = self._replica.seen().get(store.site)
        assert own.head - len(logged) <= (followed.head if followed else 0), (
            "the log lost what was not pruned"
        )
        for item in logged:
            told.note_version(item.version, compute_hash(item.payload))

    def _check_rows(self, store: Store) -> None:
        told = self.acknowledged
        small = dict(store.connection.execute("SELECT k, n FROM small"))
        lost = {key: n for key, n in told.small.items() if small.get(key, 0) < n}
        assert not lost, f"acknowledged writes are lost: {lost}"
        shapes = store.connection.execute("SELECT n, of_rows, count(*) FROM large GROUP BY 1, 2").fetchall()
        assert len(shapes) <= 1, f"rows of several transactions: {shapes}"
        for n, of_rows, rows in shapes:
            assert (n >= told.large, rows) == (True, of_rows)
        assert shapes or not told.large
        seen = store.seen()
        assert all(seen[self._source.site].contains(version) for version in told.merged)
        assert told.snapshot_head == 0 or seen[self._third.site].head >= told.snapshot_head
        assert store.parked() == []

    def _follow(self, store: Store) -> None:
        """Bring the replica to what the writer knows, by logs, and compare all that they hold."""
        for site, origin in (
            (store.site, store),
            (self._source.site, self._source),
            (self._third.site, self._third),
        ):
            theirs = store.seen().get(site, ())
            for first, last in theirs:
                self._replica.apply(origin.read_log(site, first, last, 1 << 40), wall_ms())
        for table in SCHEMA.tables:
            # What another connection wrote, and the kill kept from being captured, is in no log yet.
            noted = store.connection.execute(f"SELECT count(*) FROM _repl_pending_{table}").fetchone()
            if noted == (0,):
                assert self._replica.digest(table) == store.digest(table), f"the replica differs in {table}"

    async def _compare_with(self, peer: Agent) -> None:
        """Let a last writer catch up with the agent that it had met now and then."""

        def begin() -> None:
            self._next.begin(self._write_task("catch up"))
            assert self._next.listen(DEADLINE_S, b"open"), self._next.log.read_text("utf-8")
            self._check()

        await asyncio.to_thread(begin)
        wanted = [self._replica.digest(table) for table in SCHEMA.tables]
        async with asyncio.timeout(DEADLINE_S):
            while True:
                found = await peer._database.run(lambda store: [*map(store.digest, SCHEMA.tables)])
                if found == wanted:
                    return
                await asyncio.sleep(0.05)


def _describe_moment(said: list[list[str]]) -> str:
    """Return in the middle of what the writer was killed."""
    if not said:
        return "open"
    return said[-1][1] if said[-1][0] == "at" else "write"
