"""One round of the store and of an agent: writes, merges, bytes on disk.

Decides what is inside the clock: only the calls of the library, never the making of what they are given.
Databases are files, as in use. Invariant: what was merged is equal to its source, or the round fails.
"""

import asyncio
import gc
import random
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from replication.agent import Agent
from replication.core.change import Commit, EncodedChangeset
from replication.schema import Schema
from replication.settings import AgentSettings
from replication.statements import Statement
from replication.store import Store

TABLE = """CREATE TABLE items (
    id INTEGER NOT NULL PRIMARY KEY,
    c1 TEXT NOT NULL DEFAULT '', c2 TEXT NOT NULL DEFAULT '', c3 TEXT NOT NULL DEFAULT '',
    c4 TEXT NOT NULL DEFAULT '', c5 INTEGER NOT NULL DEFAULT 0, c6 INTEGER NOT NULL DEFAULT 0,
    c7 REAL NOT NULL DEFAULT 0, c8 TEXT NOT NULL DEFAULT '', c9 TEXT
);"""
MODES = ("row", "column")
COLUMNS = "c1, c2, c3, c4, c5, c6, c7, c8, c9"
CELLS = 9  # of a row that a merge brings: its key is not one
INSERT = f"INSERT INTO items (id, {COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
UPDATE = f"UPDATE items SET ({COLUMNS}) = (?, ?, ?, ?, ?, ?, ?, ?, ?) WHERE id = ?"
UPDATE_TWO = "UPDATE items SET c3 = ?, c5 = ? WHERE id = ?"
# What an agent gives to the store at once when changesets wait.
WAITING = 512
WRITERS = 64  # of an agent, at the same time
# How far behind the clock of one who writes the same rows is, so that all it writes loses.
STALE_MS = 60_000
LOG_BYTES_MAX = 1 << 30  # all of it
LOG_VERSIONS_MAX = 100_000
# Enough for the log to be small beside the table; in a smaller file it may have the bytes that it always may.
STEADY_ROWS = 20_000
STEADY_CHANGES = 5  # of each row
STEADY_BATCH = 100


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much one round does."""

    rows: int
    batch: int  # rows of a transaction
    singles: int  # transactions of one row


@dataclass(frozen=True, slots=True)
class Round:
    """CPU seconds by measure, and bytes by what was stored."""

    cpu: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)


def make_schema(mode: str) -> Schema:
    """Return the table of ten columns, merged by row or by column."""
    return Schema.parse(f"-- merge: {mode}\n{TABLE}")


def compute_row(i: int, generation: int) -> tuple[int | float | str, ...]:
    """Return the nine values of a row, as crsqlite.mjs does; another generation shares none of them."""
    g = generation
    return (
        *(f"name-{i}-{g}", f"app-{i % 97}-{g}", f"ams-{g}", f"10.0.{i % 250}.7:{8080 + g}"),
        *(i * 7 + g, i + 1000 * g, i + g + 0.5, f"{'x' * 40}-{i}-{g}", f"started-{g}"),
    )


def measure(work: Callable[[], object]) -> float:
    """Return the CPU seconds that the process spent on it, its threads included."""
    before = time.process_time()
    work()
    return time.process_time() - before


def wall_ms() -> int:
    """Return the time for the clocks of changes."""
    return time.time_ns() // 1_000_000


def run_round(folder: Path, mode: str, sizes: Sizes) -> Round:
    """Measure everything once, on new files in the folder."""
    result = Round()
    result.bytes["plain"] = measure_plain(folder / "plain.db", sizes, result.cpu)
    schema = make_schema(mode)
    with (
        closing(Store.open(folder / "source.db", schema)) as source,
        closing(Store.open(folder / "target.db", schema)) as target,
        closing(Store.open(folder / "waiting.db", schema)) as waiting,
        closing(Store.open(folder / "other.db", schema)) as other,
    ):
        inserts = [(i, *compute_row(i, 0)) for i in range(1, sizes.rows + 1)]
        updates = [(*compute_row(i, 1), i) for i in range(1, sizes.rows + 1)]
        ones = [(i, *compute_row(i, 0)) for i in range(sizes.rows + 1, sizes.rows + sizes.singles + 1)]

        stale, _ = write(other, INSERT, inserts, sizes.batch, now_ms=wall_ms() - STALE_MS)
        old, result.cpu["local"] = write(source, INSERT, inserts, sizes.batch)
        fresh, _ = write(source, UPDATE, updates, sizes.batch)
        single, result.cpu["local_single"] = write(source, INSERT, ones, 1)

        result.cpu["empty"] = measure(lambda: merge(target, old, 1))
        result.bytes["replicated"] = measure_file(target, source)
        result.cpu["duplicate"] = measure(lambda: merge(target, old, 1))
        result.cpu["overwrite"] = measure(lambda: merge(target, fresh, 1))
        result.cpu["single"] = measure(lambda: merge(target, single, 1))
        merge(waiting, fresh, 1)
        result.cpu["late"] = measure(lambda: merge(waiting, old, 1))
        result.cpu["single_waiting"] = measure(lambda: merge(waiting, single, WAITING))
        result.cpu["stale"] = measure(lambda: merge(waiting, stale, 1))
        for replica in (target, waiting):
            if replica.digest("items") != source.digest("items"):
                raise RuntimeError("a replica differs from its source")
    result.bytes["two_columns"] = measure_two_columns(folder, mode, sizes)
    return result


def write(
    store: Store, sql: str, rows: Sequence[Sequence[int | float | str]], batch: int, now_ms: int | None = None
) -> tuple[list[EncodedChangeset], float]:
    """Write rows, so many a transaction; return the changesets, and the CPU seconds that it took."""
    changesets: list[EncodedChangeset] = []
    transactions = [
        [(sql, row) for row in rows[first : first + batch]] for first in range(0, len(rows), batch)
    ]

    def act() -> None:
        for statements in transactions:
            _, commit = store.execute(statements, wall_ms() if now_ms is None else now_ms)
            assert commit is not None, "every value is new"
            changesets.extend(commit.changesets)

    return changesets, measure(act)


def merge(store: Store, changesets: Sequence[EncodedChangeset], batch: int) -> None:
    """Apply changesets, so many a transaction."""
    for first in range(0, len(changesets), batch):
        if store.apply(changesets[first : first + batch], wall_ms()).parked:
            raise RuntimeError("a changeset could not be applied")


def measure_plain(path: Path, sizes: Sizes, cpu: dict[str, float]) -> int:
    """Write the same rows to the same table without replication, as both sides can; return its bytes."""
    rows = [(i, *compute_row(i, 0)) for i in range(1, sizes.rows + 1)]
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(TABLE)

        def act() -> None:
            for first in range(0, len(rows), sizes.batch):
                connection.execute("BEGIN IMMEDIATE")
                for row in rows[first : first + sizes.batch]:
                    connection.execute(INSERT, row)
                connection.execute("COMMIT")

        cpu["plain"] = measure(act)
        return compute_bytes(connection)


def measure_two_columns(folder: Path, mode: str, sizes: Sizes) -> int:
    """Return the bytes of a replica when two columns of half of its rows were changed later."""
    schema = make_schema(mode)
    with (
        closing(Store.open(folder / "writer.db", schema)) as source,
        closing(Store.open(folder / "reader.db", schema)) as target,
    ):
        write(source, INSERT, [(i, *compute_row(i, 0)) for i in range(1, sizes.rows + 1)], sizes.batch)
        write(source, UPDATE_TWO, [(f"gru-{i}", i, i) for i in range(1, sizes.rows + 1, 2)], sizes.batch)
        last = source.seen()[source.site].last
        merge(target, source.read_log(source.site, 1, last, LOG_BYTES_MAX), 1)
        return measure_file(target, source)


def measure_file(store: Store, source: Store) -> int:
    """Return the bytes of the database without the log of the source's changesets."""
    store.prune_log({source.site: store.seen()[source.site].last + 1})
    return compute_bytes(store.connection)


def compute_bytes(connection: sqlite3.Connection) -> int:
    """Return the pages that hold something, times their size; what VACUUM would leave."""
    connection.execute("VACUUM")
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    return int(pages) * int(size)


def measure_steady(folder: Path, mode: str) -> tuple[int, int]:
    """Return the size of a replica's file after many changes, with its log at its bound, and of a plain one.

    Every row is changed several times, all columns at once, in random order; nothing is ever vacuumed.
    """
    rng = random.Random(STEADY_ROWS)
    rows = [(i, *compute_row(i, 0)) for i in range(1, STEADY_ROWS + 1)]
    changes = [
        (*compute_row(i, g), i) for g in range(1, STEADY_CHANGES + 1) for i in range(1, STEADY_ROWS + 1)
    ]
    rng.shuffle(changes)
    plain = folder / "steady-plain.db"
    with closing(sqlite3.connect(plain)) as connection, connection:
        connection.execute(TABLE)
        connection.executemany(INSERT, rows)
        connection.executemany(UPDATE, changes)
    with closing(Store.open(folder / f"steady-{mode}.db", make_schema(mode))) as store:
        for sql, values in ((INSERT, rows), (UPDATE, changes)):
            for first in range(0, len(values), STEADY_BATCH):
                write(store, sql, values[first : first + STEADY_BATCH], STEADY_BATCH)
                store.trim_log(LOG_VERSIONS_MAX, 0)
    return (folder / f"steady-{mode}.db").stat().st_size, plain.stat().st_size


def measure_agent(folder: Path, mode: str, sizes: Sizes) -> dict[str, float]:
    """Return CPU seconds of writes through an agent, its thread and its event loop together.

    Each is awaited before the next, but for those of many writers.
    """
    settings = AgentSettings("bench", folder / "agent.db", bind=("127.0.0.1", 0))
    commits: list[Commit] = []
    cpu: dict[str, float] = {}
    statements = [(INSERT, (i, *compute_row(i, 0))) for i in range(2 * sizes.singles + sizes.rows)]
    ones, many = statements[: sizes.singles], statements[2 * sizes.singles :]
    shared = statements[sizes.singles : 2 * sizes.singles]

    async def write_in_turn(agent: Agent, statements: Sequence[Statement]) -> None:
        for statement in statements:
            await agent.execute([statement])

    async def act() -> None:
        gc.collect()  # what the rounds before have left is not this one's to look through
        agent = Agent(settings, make_schema(mode), on_commit=commits.append)
        await agent.start()
        try:
            before = time.process_time()
            await write_in_turn(agent, ones)
            cpu["agent_single"] = time.process_time() - before
            before = time.process_time()
            await asyncio.gather(*(write_in_turn(agent, shared[i::WRITERS]) for i in range(WRITERS)))
            cpu["agent_writers"] = time.process_time() - before
            before = time.process_time()
            for first in range(0, sizes.rows, sizes.batch):
                await agent.execute(many[first : first + sizes.batch])
            cpu["agent"] = time.process_time() - before
        finally:
            await agent.stop()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(act())
    return cpu
