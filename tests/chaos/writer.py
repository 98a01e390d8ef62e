"""The process that is killed: writes at full speed, and says what was acknowledged once it was.

A line is one write to a pipe, made after the call has returned, so that what was said did happen:
`open SITE` · `at WHAT`, before something of interest · `own VERSION HASH` · `small KEY N` · `large N` ·
`merged VERSION…` · `snapshot HEAD`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import sqlite3
import sys
import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack

from replication.agent import Agent
from replication.core.change import EncodedChangeset
from replication.database import Database
from replication.settings import AgentSettings
from replication.store import Store
from tests.chaos.world import PUT_SHARED, PUT_SMALL, SCHEMA, SMALL_KEYS, WRITERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from replication.core.change import Commit


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


def compute_hash(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()[:16]


def say_own(site: bytes, commit: Commit | None) -> None:
    for item in commit.changesets if commit else ():
        if item.site == site:
            say("own", item.version, compute_hash(item.payload))


def compute_large(rng: random.Random, n: int) -> list[tuple[str, Any]]:
    """Return a transaction that replaces all rows of a table."""
    rows = rng.choice((10, 300, 2000))
    statements: list[tuple[str, Any]] = [("DELETE FROM large", ())]
    insert = "INSERT INTO large VALUES (?, ?, ?, ?)"
    statements += [(insert, (key, n, rows, "x" * rng.randrange(60))) for key in range(rows)]
    return statements


class StoreWriter:
    """All that a store can do, one after another."""

    def __init__(self, store: Store, task: dict[str, Any], rng: random.Random) -> None:
        self._store = store
        self._task = task
        self._rng = rng
        self._counter = count(read_counter(store) + 1)
        self._inbox = [
            EncodedChangeset(task["inbox_site"], version, payload) for version, payload in task["inbox"]
        ]
        self._other = sqlite3.connect(task["path"], isolation_level=None)

    def run(self) -> None:
        acts: dict[Callable[[], None], int] = {
            self._put_small: 60,
            self._put_large: 4,
            self._put_shared: 10,
            self._merge: 15,
            self._put_from_outside: 5,
            self._checkpoint: 2,
            self._prune: 2,
            self._apply_snapshot: 1,
        }
        while True:
            (act,) = self._rng.choices(list(acts), list(acts.values()))
            act()

    def _put_small(self) -> None:
        key, n = self._rng.randrange(SMALL_KEYS), next(self._counter)
        _, commit = self._store.execute([(PUT_SMALL, (key, n))], wall_ms())
        say_own(self._store.site, commit)
        say("small", key, n)

    def _put_from_outside(self) -> None:
        key, n = self._rng.randrange(SMALL_KEYS), next(self._counter)
        self._other.execute(PUT_SMALL, (key, n))
        say("small", key, n)
        say_own(self._store.site, self._store.capture(wall_ms()))

    def _put_large(self) -> None:
        n = next(self._counter)
        say("at", "large")
        _, commit = self._store.execute(compute_large(self._rng, n), wall_ms())
        say_own(self._store.site, commit)
        say("large", n)

    def _put_shared(self) -> None:
        values = (self._rng.randrange(50), next(self._counter), 0)
        _, commit = self._store.execute([(PUT_SHARED, values)], wall_ms())
        say_own(self._store.site, commit)

    def _merge(self) -> None:
        batch = self._rng.sample(self._inbox, min(len(self._inbox), self._rng.randint(1, 20)))
        say("at", "merge")
        self._store.apply(batch, wall_ms())
        say("merged", *(item.version for item in batch))

    def _checkpoint(self) -> None:
        say("at", "checkpoint")
        self._store.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _prune(self) -> None:
        say("at", "prune")
        self._store.prune_log({self._store.site: self._task["prune_below"]})
        self._store.trim_log(20_000, 1 << 28)

    def _apply_snapshot(self) -> None:
        say("at", "snapshot")
        self._store.apply_snapshot(self._task["snapshot"], wall_ms())
        say("snapshot", self._task["snapshot_head"])


def read_counter(store: Store) -> int:
    """Return the largest number that was ever written."""
    sql = "SELECT max(ifnull((SELECT max(n) FROM small), 0), ifnull((SELECT max(n) FROM large), 0))"
    return int(store.connection.execute(sql).fetchone()[0])


async def write_concurrently(execute: Callable[..., Any], counter: int, rng: random.Random) -> None:
    """Let many writers wait for their answers at the same time."""
    numbers = count(counter + 1)

    async def write_on(key: int) -> None:
        while True:
            n = next(numbers)
            if rng.random() < 0.005:
                say("at", "large")
                await execute(compute_large(rng, n))
            else:
                await execute([(PUT_SMALL, (key, n))])
                say("small", key, n)

    await asyncio.gather(*(write_on(SMALL_KEYS + number) for number in range(WRITERS)))


async def run_database(task: dict[str, Any], rng: random.Random) -> None:
    """Write through a database, while changesets are merged."""
    site = b""
    database = await Database.open(
        Path(task["path"]),
        SCHEMA,
        lambda commit: say_own(site, commit),
        rows_max=1,
        timeout_ms=1_000,
    )
    site = await database.run(lambda store: store.site)
    say("open", site.hex())
    inbox = [EncodedChangeset(task["inbox_site"], version, payload) for version, payload in task["inbox"]]

    async def merge() -> None:
        while True:
            batch = rng.sample(inbox, min(len(inbox), 10))
            await database.commit(
                lambda store, batch=batch: store.apply(batch, wall_ms()), lambda result: result.commit
            )
            say("merged", *(item.version for item in batch))

    merging = asyncio.create_task(merge())
    counter = await database.run(read_counter)
    await write_concurrently(lambda calls: database.execute(calls, wall_ms()), counter, rng)
    await merging


async def run_agent(task: dict[str, Any], rng: random.Random) -> None:
    """Write through an agent that has a peer; without a word when it shall only catch up."""
    site = b""
    settings = AgentSettings("writer", Path(task["path"]), bind=("127.0.0.1", 0), join=(task["peer"],))
    agent = Agent(settings, SCHEMA, on_commit=lambda commit: say_own(site, commit))
    await agent.start()
    site = agent.site
    say("open", site.hex())
    if task["mode"] == "catch up":
        await asyncio.Event().wait()
    counter = (await agent.query("SELECT max(n) FROM (SELECT n FROM small UNION SELECT n FROM large)")).rows
    await write_concurrently(agent.execute, counter[0][0] or 0, rng)


def main() -> None:
    """Wait for the task, so that the interpreter has started when the clock does, and do it until killed."""
    task = msgpack.unpackb(Path(sys.stdin.readline().strip()).read_bytes())
    rng = random.Random(task["seed"])
    if task["mode"] == "store":
        store = Store.open(task["path"], SCHEMA)
        say("open", store.site.hex())
        StoreWriter(store, task, rng).run()
    asyncio.run(run_database(task, rng) if task["mode"] == "database" else run_agent(task, rng))


if __name__ == "__main__":
    main()
