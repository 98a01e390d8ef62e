"""How fast may be written, and how fast the pushes of one origin are taken in.

Decides who has to wait, and how long. Knows nothing of what is written. Invariant: over any while, what is
let through is at most the rate for that long, the burst, and one thing more: a bucket that is not empty lets
through whatever comes, however large, and is in debt then; for at most DEBT_S_MAX.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from replication.core.change import EncodedChangeset
from replication.core.clock import SiteId

# What may come at once after a quiet time, in seconds of the rate.
BURST_S = 2.0
# A debt is paid off after this long: one import must not shut out all writers for an hour.
DEBT_S_MAX = 10.0
# Origins that are remembered; with more, the one that was heard of longest ago starts afresh.
ORIGINS_MAX = 4_096
# Origins that are counted by name; more would make as many series of a metric.
ORIGINS_NAMED = 32
# The name under which a limit of all tables together is kept.
ALL = ""


class Bucket:
    """Tokens that come back at a steady rate."""

    __slots__ = ("_at_ms", "_level", "per_s")

    def __init__(self, per_s: float, now_ms: float) -> None:
        self.per_s = per_s
        self._level = self._full
        self._at_ms = now_ms

    @property
    def _full(self) -> float:
        return max(1.0, self.per_s * BURST_S)

    def compute_wait_ms(self, now_ms: float, under_way: int = 0) -> float:
        """Return how long until something may pass; 0 when it may now. What is under way counts as spent."""
        self._fill(now_ms)
        return max(0.0, (1 + under_way - self._level) / self.per_s * 1000)

    def spend(self, count: float, now_ms: float) -> None:
        """Take tokens out, also more than there are."""
        self._fill(now_ms)
        self._level = max(self._level - count, -self.per_s * DEBT_S_MAX)

    def _fill(self, now_ms: float) -> None:
        self._level = min(self._full, self._level + (now_ms - self._at_ms) / 1000 * self.per_s)
        self._at_ms = now_ms


def names_table(sql: str, table: str) -> bool:
    """Return whether a statement names a table, be it to read it, or in a text."""
    return table.lower() in sql.lower()


class Refusal(NamedTuple):
    """Why a write has to wait; the table is ALL where it is the limit of all together."""

    table: str
    rows_per_s: float
    wait_ms: float


class WriteLimits:
    """Rows per second into tables; without limits everything passes."""

    def __init__(self, rows_per_s: Mapping[str, float], now_ms: float) -> None:
        self.refused: Counter[str] = Counter()  # writes, by the limit that refused them
        self._buckets = {table: Bucket(per_s, now_ms) for table, per_s in rows_per_s.items() if per_s}
        self._under_way: Counter[str] = Counter()  # statements, from `begin` to `end`

    def __bool__(self) -> bool:
        """Whether there is any limit; without one there is nothing to ask."""
        return bool(self._buckets)

    def find(self, sql: str) -> list[str]:
        """Return the limits that a statement comes under: those of all tables that it names, and ALL."""
        return [table for table in self._buckets if names_table(sql, table)]

    def begin(self, limits: Collection[str], now_ms: float) -> Refusal | None:
        """Let statements run that come under these limits, each as often as it is given, or say why not."""
        for table in dict.fromkeys(limits):
            bucket = self._buckets[table]
            wait_ms = bucket.compute_wait_ms(now_ms, self._under_way[table])
            if wait_ms:
                self.refused[table] += 1
                return Refusal(table, bucket.per_s, wait_ms)
        self._under_way.update(limits)
        return None

    def end(self, limits: Collection[str]) -> None:
        """Take note that statements for which there was a `begin` are over."""
        self._under_way.subtract(limits)

    def spend(self, limit: str, rows: int, now_ms: float) -> None:
        """Count what was written under a limit."""
        self._buckets[limit].spend(rows, now_ms)

    def spend_tables(self, tables: Iterable[str], now_ms: float) -> None:
        """Count rows that were written, given by their table."""
        for table, rows in Counter(tables).items():
            for limit in {table, ALL} & self._buckets.keys():
                self.spend(limit, rows, now_ms)

    def compute_exhausted(self, tables: Iterable[str], now_ms: float) -> frozenset[str]:
        """Return those of the tables into which nothing may be written now."""
        spent = {table for table, bucket in self._buckets.items() if bucket.compute_wait_ms(now_ms)}
        return frozenset(tables) if ALL in spent else frozenset(spent & frozenset(tables))


@dataclass(frozen=True, slots=True)
class OriginSettings:
    """What is taken in of one origin's pushes, beyond which its changes come by sync; 0 is no limit.

    A node that writes as fast as it can makes a few thousand changesets a second.
    """

    changesets_per_s: float = 2_000
    bytes_per_s: float = 16 * 1024 * 1024


class OriginLimits:
    """How much of each origin has come."""

    def __init__(self, settings: OriginSettings) -> None:
        # Pushes that were not taken in, by origin; None stands for all that are not named.
        self.refused: Counter[SiteId | None] = Counter()
        self._settings = settings
        self._origins: OrderedDict[SiteId, tuple[Bucket | None, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._origins)

    def is_over(self, site: SiteId, now_ms: float) -> bool:
        """Return whether nothing of an origin is taken in now."""
        return any(bucket and bucket.compute_wait_ms(now_ms) for bucket in self._origins.get(site, ()))

    def admit(self, changeset: EncodedChangeset, now_ms: float) -> bool:
        """Count a changeset that was pushed; False when it is not to be taken in."""
        site = changeset.site
        if self.is_over(site, now_ms):
            named = site in self.refused or len(self.refused) < ORIGINS_NAMED
            self.refused[site if named else None] += 1
            return False
        settings = self._settings
        if site not in self._origins:
            rates = (settings.changesets_per_s, settings.bytes_per_s)
            self._origins[site] = tuple(Bucket(per_s, now_ms) if per_s else None for per_s in rates)
            if len(self._origins) > ORIGINS_MAX:
                self._origins.popitem(last=False)
        self._origins.move_to_end(site)
        for bucket, count in zip(self._origins[site], (1, len(changeset.payload)), strict=True):
            if bucket is not None:
                bucket.spend(count, now_ms)
        return True
