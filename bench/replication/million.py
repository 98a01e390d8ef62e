"""A snapshot of 1,000,000 rows from store to store, each side a process of its own whose memory is measured.

Decides what a side does; the main process only starts them. There is no network: the chunks go through a
file, as they wait in one between agents. Invariant: what arrived is equal to its source, or it all fails.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from replication.store import Store

from .ours import INSERT, compute_row, make_schema, wall_ms

ROWS = 1_000_000
BATCH = 10_000
CHUNK_BYTES = 1 << 20  # as agents have it


def measure_million(mode: str) -> dict[str, float]:
    """Return seconds and MB by what was done; raises CalledProcessError when a side fails."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES:
            command = [sys.executable, "-m", __name__, side, folder, mode]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.update(json.loads(done.stdout))
    return found


def fill(folder: Path, mode: str) -> dict[str, float]:
    """Make the source, its log at the bound."""
    with closing(Store.open(folder / "source.db", make_schema(mode))) as store:
        for first in range(1, ROWS + 1, BATCH):
            store.execute([(INSERT, (i, *compute_row(i, 0))) for i in range(first, first + BATCH)], wall_ms())
            store.trim_log(ROWS, 16 << 20)
    return {}


def hold(folder: Path, mode: str) -> dict[str, float]:
    """Open the source and write to it."""
    with closing(Store.open(folder / "source.db", make_schema(mode))) as store:
        store.execute([("UPDATE items SET c5 = -1 WHERE id <= 100", ())], wall_ms())
        return {"hold_mb": read_peak_mb()}


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
            "send_mb": read_peak_mb(),
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
        peak_mb = read_peak_mb()
        with closing(Store.open(folder / "source.db", make_schema(mode))) as source:
            if source.digest("items") != store.digest("items"):
                raise RuntimeError("a replica differs from its source")
    return {"take_s": seconds, "take_mb": peak_mb}


def read_chunks(spool: BinaryIO) -> Iterator[bytes]:
    """Yield what `send` wrote."""
    while header := spool.read(4):
        yield spool.read(int.from_bytes(header, "big"))


def read_peak_mb() -> float:
    """Return the most memory that this process had."""
    # Not getrusage: that begins with what the process had that started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1e3


SIDES: dict[str, Callable[[Path, str], dict[str, float]]] = {
    side.__name__: side for side in (fill, hold, send, take)
}

if __name__ == "__main__":
    print(json.dumps(SIDES[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])))
