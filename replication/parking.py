"""Keep the changesets that could not be applied here, with the reason, until they can be or are given up.

This module does not decide what can be applied. What it holds counts as seen: peers do not send it again. It
runs within transactions of its caller.

Invariant: a changeset that was put here is here until it is taken out by name, or all are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .core.change import EncodedChangeset

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    from .core.clock import SiteId
    from .tables import Sites


@dataclass(frozen=True, slots=True)
class ParkedChangeset:
    """A changeset that is held but could not be applied, and why."""

    site: SiteId
    version: int
    reason: str
    payload: bytes

    @property
    def encoded(self) -> EncodedChangeset:
        """The changeset as it came."""
        return EncodedChangeset(self.site, self.version, self.payload)


class Parking:
    """What one replica holds and could not apply."""

    def __init__(self, connection: sqlite3.Connection, sites: Sites) -> None:
        self._connection = connection
        self._sites = sites

    def put(self, parked: Sequence[tuple[EncodedChangeset, str]]) -> None:
        """Add changesets with their reasons."""
        if not parked:
            return
        self._connection.executemany(
            "INSERT OR REPLACE INTO _repl_parked VALUES (?, ?, ?, ?)",
            [
                (self._sites.get_ordinal(encoded.site), encoded.version, reason, encoded.payload)
                for encoded, reason in parked
            ],
        )

    def read(self) -> list[ParkedChangeset]:
        """Return what is here, the oldest first."""
        found = self._connection.execute(
            "SELECT site, version, reason, payload FROM _repl_parked ORDER BY rowid"
        ).fetchall()
        return [ParkedChangeset(self._sites.get_site(row[0]), *row[1:]) for row in found]

    def is_empty(self) -> bool:
        """True when nothing is here."""
        return self._connection.execute("SELECT 1 FROM _repl_parked LIMIT 1").fetchone() is None

    def remove(self, site: SiteId, version: int) -> bool:
        """Take one out; return whether it was here."""
        cursor = self._connection.execute(
            "DELETE FROM _repl_parked WHERE site = ? AND version = ?", (self._sites.find(site), version)
        )
        return cursor.rowcount > 0

    def clear(self) -> None:
        """Take all out."""
        self._connection.execute("DELETE FROM _repl_parked")
