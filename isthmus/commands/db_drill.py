"""`isthmus db drill`: put a backup back where nothing depends on it, and see whether it would serve.

Decides what is looked at: the file is judged and adopted as `restore` does it, and routing is loaded from
what comes out, as a node would. Invariant: the running node, its database and the backup stay as they are.
"""

from __future__ import annotations

import sqlite3
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from isthmus.client import ClientError, find_data_dir
from isthmus.commands.listing import format_ago
from isthmus.exercises import Exercise, note_exercise, read_exercises
from isthmus.wording import count_of
from replication.errors import ReplicationError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable


def add_drill_parser(actions: Any, add_file_flags: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add `drill` to the actions of `db`."""
    drill = actions.add_parser(
        "drill", help="rehearse a restore: put a backup back beside the node, and look"
    )
    drill.add_argument(
        "backup", metavar="FILE", type=Path, nargs="?", help="what `isthmus db backup` made [the last one]"
    )
    add_file_flags(drill)
    drill.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Rehearse, note that it was done, and say what the backup holds."""
    data = find_data_dir(args).absolute()
    last = read_exercises(data).backup
    backup = args.backup or (Path(last.backup) if last is not None else None)
    if backup is None:
        raise ClientError(
            f"no backup of {data} is known: name one, or make one with `isthmus db backup PATH`"
        )
    told = rehearse(backup.absolute(), time.time_ns() // 1_000_000)
    done = Exercise(time.time_ns() // 1_000_000, told["backup"], told["taken_ms"])
    told["noted"] = note_exercise(data, "restore", done)
    if args.json:
        print(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode())
        return 0
    age = format_ago(max(0.0, done.at_ms - told["taken_ms"]))
    print(
        f"{told['backup']}: taken {age}, restored in {told['took_ms'] / 1000:.1f} s: "
        + ", ".join(count_of(told[f"{noun}s"], noun) for noun in ("app", "route", "machine"))
        + f", {count_of(told['rejected'], 'row')} that cannot be used"
    )
    if not told["noted"]:
        print(f"that cannot be noted in {data}: `isthmus doctor` will not know of it")
    return 0


def rehearse(backup: Path, now_ms: int) -> dict[str, Any]:
    """Restore into a directory of its own and load routing from it; raises ClientError."""
    from isthmus.route_feed import RouteFeed  # noqa: PLC0415 — other verbs start without it
    from replication.backup import restore_backup  # noqa: PLC0415 — see above
    from routing.table import RoutingTable  # noqa: PLC0415 — see above

    began = time.monotonic()
    table = RoutingTable()
    with tempfile.TemporaryDirectory(prefix="isthmus-drill-") as scratch:
        database = Path(scratch) / "isthmus.db"
        try:
            restored = restore_backup(backup, database, now_ms)
            RouteFeed(table, database).load()
        except (ReplicationError, sqlite3.Error, OSError) as error:
            raise ClientError(f"{backup} cannot be put back: {error}") from None
    return {
        "backup": str(backup),
        "taken_ms": restored.backup.taken_ms,
        "took_ms": round((time.monotonic() - began) * 1000),
        "apps": sum(app.row is not None for app in table.apps()),
        "routes": sum(1 for _ in table.routes()),
        "machines": table.machines_count,
        "rejected": len(table.rejected),
    }
