"""Bugs to plant in a simulated cluster, to show that its checkers find them.

Decides how each is broken. The product knows nothing of this: a bug is a subclass or a wrapper that only the
simulator uses, and only when a test asks for it. Invariant: without a bug everything is the real thing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from replication.applying import Applier
from replication.core.change import Changeset, EncodedChangeset, RowChange
from replication.core.clock import SiteId
from replication.core.needs import Seen
from replication.core.versions import VersionRanges
from replication.schema import Schema
from replication.store import ApplyResult, Store


@dataclass(frozen=True, slots=True)
class Build:
    """What a simulated node is made of."""

    store_class: type[Store] = Store
    renews_identity: bool = True  # a store that comes back from a power failure is told of the new boot
    view: Callable[[Seen], Seen] = lambda seen: seen  # what a sync believes that the node has seen


class _SeenBeforeCommit(Store):
    """Marks changesets as seen in a transaction of its own, before the one that applies them."""

    def apply(self, batch: Sequence[EncodedChangeset], wall_ms: int) -> ApplyResult:
        """Apply in two transactions where one is needed."""
        seen = self.seen()
        fresh = [
            item for item in batch if item.site not in seen or not seen[item.site].contains(item.version)
        ]
        if not fresh:
            return ApplyResult(None, 0, len(batch), 0)
        with self._transaction():
            self.log.append(fresh)
            for item in fresh:
                self.ledger.mark(item.site, item.version, item.version)
            self._conclude([], [])
        with self._transaction():
            rows, parked = self.applier.apply(fresh, wall_ms)
            self.parking.put(parked)
            commit = self._conclude(rows, fresh)
        return ApplyResult(commit, len(fresh) - len(parked), len(batch) - len(fresh), len(parked))


class _AnySite(bytes):
    """A site that is equal to all others, so that only the time of two writes is compared."""

    __slots__ = ()
    __hash__ = bytes.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, bytes)

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, bytes)


class _TieApplier(Applier):
    """Lets the first of two writes with the same time win, whoever made it."""

    def merge_at_once(self, changesets: Sequence[tuple[EncodedChangeset, Changeset]]) -> list[RowChange]:
        return super().merge_at_once(
            [
                (replace(encoded, site=SiteId(_AnySite(encoded.site))), change)
                for encoded, change in changesets
            ]
        )


class _TieByArrival(Store):
    """A store with that."""

    def _use(self, schema: Schema) -> None:
        super()._use(schema)
        self.applier = _TieApplier(self.connection, schema, self.tables, self.sites, self._clock)


class _TornApplier(Applier):
    """Forgets the last row of a large transaction."""

    def merge_at_once(self, changesets: Sequence[tuple[EncodedChangeset, Changeset]]) -> list[RowChange]:
        halves = []
        for encoded, (hlc, changes) in changesets:
            kept = tuple(
                change._replace(rows=change.rows[:-1], created=change.created[:-1])
                if change.table == "ledger" and len(change.rows) > 3
                else change
                for change in changes
            )
            halves.append((encoded, Changeset(hlc, kept)))
        return super().merge_at_once(halves)


class _Torn(Store):
    """A store with that."""

    def _use(self, schema: Schema) -> None:
        super()._use(schema)
        self.applier = _TornApplier(self.connection, schema, self.tables, self.sites, self._clock)


def _without_gaps(seen: Seen) -> Seen:
    return {site: VersionRanges([(1, ranges.last)]) for site, ranges in seen.items() if ranges}


PLANTED = {
    "seen-before-commit": Build(store_class=_SeenBeforeCommit),
    "tie-by-arrival": Build(store_class=_TieByArrival),
    "gap-not-asked": Build(view=_without_gaps),
    "identity-kept": Build(renews_identity=False),
    "torn": Build(store_class=_Torn),
}
