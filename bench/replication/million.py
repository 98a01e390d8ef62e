"""A snapshot of 1,000,000 rows from store to store, each side a process of its own whose memory is measured.

Decides what a side does; the main process only starts them. There is no network: the chunks go through a
file, as they wait in one between agents. Invariant: what arrived is equal to its source, or it all fails.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from replication.core.clock import SITE_BYTES, SiteId
from replication.store import Store

from .ours import INSERT, compute_row, make_schema, wall_ms

ROWS = 1_000_000
SITES = 1_000  # that have written, the one of the source among them
BATCH = 10_000
CHUNK_BYTES = 1 << 20  # as agents have it


def measure_million(folder: Path, mode: str) -> dict[str, float]:
    """Return seconds and MB by what was done; raises CalledProcessError when a side fails.

    The source stays in the folder.
    """
    found: dict[str, float] = {}
    for side in SIDES:
        command = [sys.executable, "-m", __name__, side, str(folder), mode]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.update(json.loads(done.stdout))
    return found


def make_sites() -> list[SiteId]:
    """Return the sites that have written the last rows, one each."""
    return [SiteId(number.to_bytes(SITE_BYTES, "big")) for number in range(1, SITES)]


def fill(folder: Path, mode: str) -> dict[str, float]:
    """Make the source, its log at the bound."""
    schema = make_schema(mode)
    rows = [range(first, min(first + BATCH, ROWS - SITES + 2)) for first in range(1, ROWS - SITES + 2, BATCH)]
    with closing(Store.open(folder / "source.db", schema)) as store:
        for numbers in rows:
            store.execute([(INSERT, (i, *compute_row(i, 0))) for i in numbers], wall_ms())
            store.trim_log(ROWS, 16 << 20)
        for i, site in enumerate(make_sites(), ROWS - SITES + 2):
            with closing(Store.open(":memory:", schema, site=site)) as other:
                _, commit = other.execute([(INSERT, (i, *compute_row(i, 0)))], wall_ms())
                assert commit is not None, "the row is new"
                store.apply(commit.changesets, wall_ms())
    return {}


def hold(folder: Path, mode: str) -> dict[str, float]:
    """Open the source and write to it."""
    with closing(Store.open(folder / "source.db", make_schema(mode))) as store:
        store.execute([("UPDATE items SET c5 = -1 WHERE id <= 100", ())], wall_ms())
        return {"hold_mb": read_memory_mb("VmHWM")}


def send(folder: Path, mode: str) -> dict[str, float]:
    """Write the snapshot to a file."""
    with (
        closing(Store.open(folder / "source.db", make_schema(mode))) as store,
        (folder / "spool").open("wb") as spool,
    ):
        before = time.monotonic()
        for chunk in store.snapshot(CHUNK_BYTES):
            spool.write(len(chunk).to_bytes(4, "big") + chunk)
        return {
            "send_s": time.monotonic() - before,
            "send_mb": read_memory_mb("VmHWM"),
            "snapshot_mb": spool.tell() / 1e6,
            "file_mb": (folder / "source.db").stat().st_size / 1e6,
        }


def take(folder: Path, mode: str) -> dict[str, float]:
    """Apply the snapshot to a new store."""
    with (
        closing(Store.open(folder / "target.db", make_schema(mode))) as store,
        (folder / "spool").open("rb") as spool,
    ):
        before = time.monotonic()
        store.apply_snapshot(read_chunks(spool), wall_ms())
        seconds = time.monotonic() - before
        peak_mb = read_memory_mb("VmHWM")
        with closing(Store.open(folder / "source.db", make_schema(mode))) as source:
            if source.digest("items") != store.digest("items"):
                raise RuntimeError("a replica differs from its source")
    return {"take_s": seconds, "take_mb": peak_mb}


def read_chunks(spool: BinaryIO) -> Iterator[bytes]:
    """Yield what `send` wrote."""
    while header := spool.read(4):
        yield spool.read(int.from_bytes(header, "big"))


def read_memory_mb(field: str) -> float:
    """Return what memory this process has, VmRSS, or had at most, VmHWM."""
    # Not getrusage: that begins with what the process had that started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:")) / 1e3


SIDES: dict[str, Callable[[Path, str], dict[str, float]]] = {
    side.__name__: side for side in (fill, hold, send, take)
}

if __name__ == "__main__":
    print(json.dumps(SIDES[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])))
