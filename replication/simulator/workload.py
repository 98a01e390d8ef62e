"""What the simulated nodes write.

Decides who writes what and when. Knows nothing of replication. Invariant: each transaction adds rows to the
ledger that nobody ever touches again and that say how many there are, so that losing or tearing one shows.
"""

from random import Random

from replication.schema import Schema
from replication.statements import Statement

SCHEMA_SQL = """
CREATE TABLE ledger (
    tx TEXT NOT NULL, part INTEGER NOT NULL, parts INTEGER NOT NULL DEFAULT 0, body BLOB,
    PRIMARY KEY (tx, part)
);
CREATE TABLE contended (k INTEGER PRIMARY KEY, v TEXT NOT NULL DEFAULT '', n INTEGER NOT NULL DEFAULT 0);
-- merge: column
CREATE TABLE settings (k TEXT PRIMARY KEY NOT NULL, a, b, c);
"""
TABLES = ["ledger", "contended", "settings"]
UPSERTS = {
    "a": "INSERT INTO settings (k, a) VALUES (?, ?) ON CONFLICT (k) DO UPDATE SET a = excluded.a",
    "b": "INSERT INTO settings (k, b) VALUES (?, ?) ON CONFLICT (k) DO UPDATE SET b = excluded.b",
    "c": "INSERT INTO settings (k, c) VALUES (?, ?) ON CONFLICT (k) DO UPDATE SET c = excluded.c",
}
# Few enough that nodes get in each other's way all the time.
KEYS = 6
PARTS_MAX = 5
# Now and then a transaction is so large that it fills caches and takes a while on a slow network.
LARGE_BYTES = 3_000


def make_schema() -> Schema:
    """Return the tables of every simulated node."""
    return Schema.parse(SCHEMA_SQL)


class Workload:
    """Transactions, one after another."""

    def __init__(self, seed: int) -> None:
        self._rng = Random(f"{seed}/workload")
        self._number = 0

    def next_in_us(self, per_s: float) -> int:
        """Return how long until the next write of anybody."""
        return int(self._rng.expovariate(per_s) * 1e6)

    def choose_writers(self, count: int) -> list[int]:
        """Return who writes at the same moment: usually one, at times several, for ties."""
        wanted = 1 if self._rng.random() < 0.75 else self._rng.randrange(2, 5)
        return self._rng.sample(range(count), min(count, wanted))

    def choose_key(self) -> int:
        """Return a row to fight over."""
        return self._rng.randrange(KEYS)

    def make_transaction(self, node: int, key: int) -> tuple[str, int, list[Statement]]:
        """Return the name, the number of ledger rows, and the statements of a new transaction."""
        rng = self._rng
        self._number += 1
        tx = f"t{self._number}"
        parts = rng.randrange(1, PARTS_MAX + 1)
        size = LARGE_BYTES if rng.random() < 0.03 else rng.randrange(40)
        statements: list[Statement] = [
            ("INSERT INTO ledger VALUES (?, ?, ?, ?)", (tx, part, parts, rng.randbytes(size)))
            for part in range(parts)
        ]
        kind = rng.randrange(5)
        if kind == 0:
            statements.append(("DELETE FROM contended WHERE k = ?", (key,)))
        elif kind < 3:
            statements.append(("INSERT OR REPLACE INTO contended VALUES (?, ?, ?)", (key, tx, node)))
        else:
            statements.append((UPSERTS["abc"[rng.randrange(3)]], (f"s{key}", tx)))
        return tx, parts, statements
