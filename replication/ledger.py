"""Which versions a replica has seen, its own counters, and what else of it a transaction changes beside rows.

Decides nothing about what a version holds. All of it is kept in memory and written with the transaction that
changes it; after one that failed it is loaded again.

Invariant: between transactions, memory says what the file says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from . import sidetables
from .core.clock import NEVER, Hlc, SiteId, hlc_from_ms
from .core.codec import pack, unpack
from .core.needs import has_seen
from .core.versions import VersionRanges
from .guarding import State

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

    from .changelog import ChangeLog
    from .core.clock import HybridClock
    from .tables import Sites

# How far ahead of the wall clock times are promised in the file, so that an idle node that beats writes a
# page in so many ms. After a crash writes begin with what was promised: with MAX_DRIFT_MS, two seconds are
# left for clocks that differ.
PROMISED_MS: Final = 3_000


class Ledger:
    """The counters of one replica."""

    def __init__(self, connection: sqlite3.Connection, sites: Sites, clock: HybridClock) -> None:
        self.site = SiteId(b"")  # set by load, from the file
        self.seq = 0  # set by load and by each commit that changes rows
        self.version = 0  # of our last changeset
        self.is_held = False  # set by load, cleared by release: versions of ours may be known to peers alone
        self.collected_hlc = NEVER  # deletions up to it may have been forgotten here
        self.seen: dict[SiteId, VersionRanges] = {}
        self.promised = NEVER  # no time that was told to others was later, and the file says so
        self.has_beaten = False  # whether times are told to others
        self._connection = connection
        self._sites = sites
        self._clock = clock
        self._ordinal = 0
        self._touched: dict[SiteId, None] = {}  # sites whose ranges the transaction has changed
        self.load()
        clock.observe(self.promised)

    def load(self) -> None:
        """Read what is kept in memory from the file: at the start, and after a rollback."""
        self._sites.reload()
        row = self._connection.execute("SELECT site, version, hlc, seq FROM _repl_state").fetchone()
        self._ordinal, self.version, hlc, self.seq = row
        self.site = self._sites.get_site(self._ordinal)
        self.promised = Hlc(hlc)
        self.seen = {
            self._sites.get_site(ordinal): VersionRanges.decode(unpack(ranges))
            for ordinal, ranges in self._connection.execute("SELECT site, ranges FROM _repl_seen")
        }
        self._touched.clear()
        self.is_held = sidetables.is_held(self._connection)
        self.collected_hlc = Hlc(sidetables.read_collected(self._connection))
        self.left = self.state()  # what the last commit left in the file

    def state(self) -> State:
        """Return what the file is to say of the replica."""
        return State(self.site, self.version, self.seq)

    def has(self, site: SiteId, version: int) -> bool:
        """True when a version was seen."""
        return has_seen(self.seen, site, version)

    def mark(self, site: SiteId, first: int, last: int) -> None:
        """Note that versions are seen with this transaction."""
        ranges = self.seen.get(site)
        if ranges is None:
            ranges = self.seen[site] = VersionRanges()
        ranges.add(first, last)
        self._touched[site] = None
        if site == self.site:
            # Our own versions, told by peers to a file that had lost them: they are taken.
            self.version = max(self.version, last)

    def adopt(self, seen: Mapping[SiteId, VersionRanges], log: ChangeLog) -> None:
        """Note what a snapshot stands for."""
        for site, theirs in seen.items():
            mine = self.seen.get(site, VersionRanges())
            unlogged = [
                last for first, last in mine.missing(theirs.last) if not _is_disjoint(theirs, first, last)
            ]
            if unlogged:
                # The log has a hole now; what is below it cannot be served without it.
                log.drop(site, unlogged[-1])
            for first, last in theirs:
                self.mark(site, first, last)

    def note_collected(self, hlc: Hlc) -> None:
        """Remember that deletions up to a time may have been forgotten."""
        if hlc > self.collected_hlc:
            sidetables.write_collected(self._connection, hlc)
            self.collected_hlc = hlc

    def promise(self, wall_ms: int) -> None:
        """Let the transaction that is under way keep times to come."""
        self.promised = max(self.promised, self._clock.last, hlc_from_ms(wall_ms + PROMISED_MS))

    def release(self) -> None:
        """Take note that all versions that a database which was put back had given out are here."""
        self._connection.execute(f"DROP TABLE IF EXISTS {sidetables.HELD_TABLE}")
        self.is_held = False

    def write(self, *, has_rows: bool) -> bool:
        """Write all of it at the end of a transaction; False when the file is not as the last one left it."""
        for site in self._touched:
            self._connection.execute(
                "INSERT OR REPLACE INTO _repl_seen VALUES (?, ?)",
                (self._sites.get_ordinal(site), pack(self.seen[site].encode())),
            )
        self._touched.clear()
        self.seq += has_rows
        left = self.left
        cursor = self._connection.execute(
            "UPDATE _repl_state SET version = ?, hlc = ?, seq = ?, merging = 0 "
            "WHERE version = ? AND seq = ? AND site = ?",
            (
                *(self.version, max(self._clock.last, self.promised), self.seq),
                *(left.version, left.seq, self._ordinal),
            ),
        )
        return cursor.rowcount == 1

    def commit(self) -> None:
        """Take note that the transaction has ended well."""
        self.left = self.state()


def _is_disjoint(ranges: VersionRanges, first: int, last: int) -> bool:
    return all(high < first or low > last for low, high in ranges)
