"""What must hold, while the cluster runs and at the end.

Decides whether a run is sound, from what was written and what each store answers. Knows nothing of faults
or messages, and trusts no core: it reads the tables themselves. Invariant: every check that was made counts,
and the first that fails ends the run.
"""

from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from replication.core.change import Commit, EncodedChangeset
from replication.core.clock import SiteId
from replication.core.needs import has_seen
from replication.store import Store

Id = tuple[SiteId, int]


class InvariantError(Exception):
    """A check failed; says which, what was found, and on which nodes."""

    def __init__(self, check: str, found: str, nodes: frozenset[int]) -> None:
        super().__init__(f"{check}: {found}")
        self.check = check
        self.found = found
        self.nodes = nodes


class Subject(Protocol):
    """A running node as the checkers see it."""

    index: int
    store: Store

    def measure(self) -> dict[str, tuple[int, int]]:
        """Return what each bounded thing holds, and its bound."""


@dataclass(slots=True)
class Write:
    """A transaction that was acknowledged: so many rows of the ledger, never touched again."""

    node: int
    tx: str
    parts: int
    # Whether it must outlive a power failure of its writer: its disk has been synced since.
    durable: bool = False


class Checkers:
    """The ledger of what was acknowledged, and the checks against it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.writes: dict[Id, Write] = {}
        self._payloads: dict[Id, bytes] = {}
        self._pending: dict[int, list[Write]] = {}  # by node: acknowledged since its disk was synced
        self._seqs: dict[int, int] = {}  # by node: of its last commit in this life

    @property
    def durable(self) -> int:
        """How many acknowledged writes may not be lost by any failure."""
        return sum(write.durable for write in self.writes.values())

    # --- what happened --------------------------------------------------------------------------------

    def acknowledge(self, node: int, id_: Id, tx: str, parts: int) -> None:
        """Note a write that its writer was told is done."""
        write = self.writes[id_] = Write(node, tx, parts)
        self._pending.setdefault(node, []).append(write)

    def note_synced(self, node: int) -> None:
        """Note that a node's disk was synced: what it acknowledged is there for good."""
        for write in self._pending.pop(node, ()):
            write.durable = True

    def note_power_lost(self, node: int) -> None:
        """Note that what a node acknowledged since the last sync may be gone."""
        self._pending.pop(node, None)

    # --- while it runs --------------------------------------------------------------------------------

    def check_commit(self, subject: Subject, commit: Commit) -> None:
        """Check what a store has just done, as any reader of the file sees it."""
        last = self._seqs.get(subject.index)
        if last is not None:
            self._expect(
                "commits_numbered", commit.seq - last in (0, 1), f"{commit.seq} after {last}", subject
            )
        self._seqs[subject.index] = commit.seq
        for changeset in commit.changesets:
            self._check_version(subject, changeset)
        for tx in dict.fromkeys(change.pk[0] for change in commit.changes if change.table == "ledger"):
            self._check_whole(subject, str(tx))

    def check_opened(self, subject: Subject) -> None:
        """Check a store that has come back: nothing durable is lost, nothing is there in part."""
        self._seqs[subject.index] = subject.store.seq
        seen = subject.store.seen()
        pending = {write.tx for write in self._pending.get(subject.index, ())}  # none after a power failure
        for (site, version), write in self.writes.items():
            if write.node == subject.index and (write.durable or write.tx in pending):
                is_there = has_seen(seen, site, version)
                self._expect("no_write_lost", is_there, f"{write.tx} is gone", subject)
        self.check_effects(subject)

    def check_effects(self, subject: Subject) -> None:
        """Check that whatever a store counts as seen is in its tables, whole."""
        seen = subject.store.seen()
        parked = {(entry.site, entry.version) for entry in subject.store.parked()}
        connection = subject.store.connection
        rows = dict(connection.execute("SELECT tx, count(*) FROM ledger GROUP BY tx"))
        for id_, write in self.writes.items():
            site, version = id_
            if id_ not in parked and has_seen(seen, site, version):
                found = f"{write.tx} is seen as {site.hex()[:8]}/{version}, but {rows.get(write.tx, 0)} of "
                self._expect(
                    "seen_means_applied",
                    rows.get(write.tx, 0) == write.parts,
                    f"{found}{write.parts} rows are there",
                    subject,
                    write.node,
                )

    def check_bounds(self, subject: Subject) -> None:
        """Check that no cache or queue is larger than it may be."""
        for name, (size, bound) in subject.measure().items():
            self._expect("memory_bounded", size <= bound, f"{name} holds {size}, may hold {bound}", subject)

    # --- at the end -----------------------------------------------------------------------------------

    def check_converged(self, subjects: list[Subject], tables: list[str]) -> None:
        """Check nodes that have seen the same: they know the same, and nothing durable is missing."""
        first = subjects[0]
        digests = {table: first.store.digest(table) for table in tables}
        for other in subjects[1:]:
            for table in tables:
                self.counts["replicas_equal"] += 1
                if other.store.digest(table) != digests[table]:
                    found = f"table {table} differs though both have seen the same"
                    raise InvariantError("replicas_equal", found, frozenset((first.index, other.index)))
        for subject in subjects:
            seen = subject.store.seen()
            for (site, version), write in self.writes.items():
                if write.durable:
                    is_there = has_seen(seen, site, version)
                    found = f"{write.tx} of node {write.node} ({site.hex()[:8]}/{version}) is not there"
                    self._expect("no_write_lost", is_there, found, subject, write.node)
            self.check_effects(subject)
            self._check_all_whole(subject)

    # --- one by one -----------------------------------------------------------------------------------

    def _check_version(self, subject: Subject, changeset: EncodedChangeset) -> None:
        id_ = (changeset.site, changeset.version)
        content = blake2b(changeset.payload, digest_size=16).digest()
        known = self._payloads.setdefault(id_, content)
        found = f"{changeset.site.hex()[:8]}/{changeset.version} names two changesets"
        self._expect("versions_never_reused", known == content, found, subject)

    def _check_whole(self, subject: Subject, tx: str) -> None:
        """Check that a transaction is there with all its rows: each of them says how many there are."""
        count, parts = subject.store.connection.execute(
            "SELECT count(*), max(parts) FROM ledger WHERE tx = ?", (tx,)
        ).fetchone()
        writers = [] if count == parts else [write.node for write in self.writes.values() if write.tx == tx]
        found = f"{count} of {parts} rows of {tx} are visible"
        self._expect("atomic", count == parts, found, subject, *writers)

    def _check_all_whole(self, subject: Subject) -> None:
        torn = subject.store.connection.execute(
            "SELECT tx, count(*), max(parts) FROM ledger GROUP BY tx HAVING count(*) <> max(parts)"
        ).fetchone()
        self._expect("atomic", torn is None, f"tx, rows, of: {torn}", subject)

    def _expect(self, check: str, holds: bool, found: str, subject: Subject, *others: int) -> None:
        self.counts[check] += 1
        if not holds:
            raise InvariantError(check, f"node {subject.index}: {found}", frozenset((subject.index, *others)))
