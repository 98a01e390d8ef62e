"""Look after the file of a replica from time to time.

Tries again what is parked, forgets what every member has passed, keeps the log and the WAL bounded, and notes
who the members are. Does not know how it is found out what they have passed.

Invariant: one look at a time, and after one that failed there is another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from replication.collecting import Collector
from replication.core.change import some
from replication.core.clock import Hlc
from replication.core.member import MemberInfo
from replication.host import Host
from replication.store import Store

# Records looked at per look: 10 ms.
COLLECTED_AT_ONCE = 100_000
CHECKPOINT_WAIT_MS = 50


@dataclass(frozen=True, slots=True)
class MaintenanceSettings:
    """The knobs of looking after a file."""

    # How many changesets per site the log keeps for repair; who lacks more gets a snapshot.
    log_versions_max: int = 100_000
    log_bytes_min: int = 16 * 1024 * 1024  # and never less of it than this
    wal_bytes_max: int = 64 * 1024 * 1024  # above it the WAL is emptied, as soon as no reader is in the way
    maintenance_ms: float = 15_000
    # Deletions are remembered for this long at least: who was away for longer starts from a snapshot.
    tombstone_keep_ms: int = 24 * 3600 * 1000


class Tidied(NamedTuple):
    """What a look has found and done."""

    parked: int  # changesets that are left
    parked_dropped: int  # since the store was opened
    tombstones: int  # that were forgotten now
    collected_hlc: Hlc
    schema_problem: str


class Maintenance:
    """Looks after one file, from `run` on."""

    def __init__(
        self,
        host: Host,
        settings: MaintenanceSettings,
        *,
        stable: Callable[[], Hlc],
        members: Callable[[], list[MemberInfo]],
        on_tidied: Callable[[Tidied], None],
        on_failed: Callable[[Exception], None],
    ) -> None:
        self._host = host
        self._settings = settings
        self._stable = stable
        self._members = members
        self._on_tidied = on_tidied
        self._on_failed = on_failed
        self._collector: Collector | None = None  # made with the first look, on the store's thread

    def run(self) -> None:
        """Look now, and then again and again."""
        self._host.commit(
            lambda store: store.retry_parked(self._host.wall_ms()),
            some,
            lambda _: self._tidy_up(),  # after the retry: what can be applied by now is not given up
            self._fail,
        )

    def _tidy_up(self) -> None:
        settings = self._settings
        stable = self._stable()
        members = self._members()

        def act(store: Store) -> Tidied:
            store.remember(members)
            if self._collector is None:
                self._collector = Collector(store, keep_ms=settings.tombstone_keep_ms)
            store.check_file()
            tombstones = self._collector.run(stable, self._host.wall_ms(), COLLECTED_AT_ONCE)
            store.trim_log(settings.log_versions_max, settings.log_bytes_min)
            store.checkpoint(settings.wal_bytes_max, CHECKPOINT_WAIT_MS)
            parked, dropped = len(store.parked()), store.dropped_parked
            return Tidied(parked, dropped, tombstones, store.collected_hlc, store.schema_problem)

        def done(found: Tidied) -> None:
            self._on_tidied(found)
            self._wait()

        self._host.run(act, done, self._fail)

    def _fail(self, error: Exception) -> None:
        self._on_failed(error)
        self._wait()

    def _wait(self) -> None:
        self._host.call_later(self._settings.maintenance_ms, self.run)
