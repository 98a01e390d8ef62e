"""Rollouts and what nodes report of them, as rows.

Decides their SQL. Refuses to know when something is written. Invariant: rows that cannot be read are left
out, as any client may write them.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

import msgspec

from isthmus.rollouts.course import Report, Rollout, State, Status

if TYPE_CHECKING:
    from isthmus.registry import Database, Statement

TABLES: Final = frozenset({"rollouts", "rollout_reports"})
# Every node keeps so many.
KEPT: Final = 50

_COLUMNS: Final = ", ".join(Rollout.__struct_fields__)

Reports = dict[str, dict[str, Report]]


async def read_rollouts(database: Database) -> tuple[list[Rollout], Reports]:
    """Return all rollouts, the newest first, and what nodes report by rollout and node."""
    rollouts: list[Rollout] = []
    sql = f"SELECT {_COLUMNS} FROM rollouts ORDER BY created_ms DESC, id DESC"  # noqa: S608 - our own names
    for row in (await database.query(sql)).rows:
        fields = dict(zip(Rollout.__struct_fields__, row, strict=True))
        try:
            fields["steps"] = msgspec.json.decode(fields["steps"])
            rollouts.append(msgspec.convert(fields, Rollout))
        except (msgspec.MsgspecError, TypeError):
            continue
    reports: Reports = {}
    sql = "SELECT rollout, node, state, detail, at_ms FROM rollout_reports"
    for rollout, node, *said in (await database.query(sql)).rows:
        with contextlib.suppress(msgspec.ValidationError):
            reports.setdefault(rollout, {})[node] = msgspec.convert(said, Report)
    return rollouts, reports


def put_rollout(rollout: Rollout) -> Statement:
    """Return what writes a new rollout."""
    fields: dict[str, Any] = msgspec.to_builtins(rollout)
    fields["steps"] = msgspec.json.encode(rollout.steps).decode()
    marks = ", ".join("?" * len(fields))
    return f"INSERT INTO rollouts ({_COLUMNS}) VALUES ({marks})", tuple(fields.values())  # noqa: S608 - as above


def end_rollout(rollout: Rollout, status: Status, reason: str, now_ms: int) -> Statement:
    """Return what writes the end of a rollout, unless it has one."""
    sql = "UPDATE rollouts SET status = ?, reason = ?, finished_ms = ? WHERE id = ? AND status = ?"
    return sql, (status.value, reason, now_ms, rollout.id, Status.RUNNING.value)


def put_report(rollout: Rollout, node: str, state: State, detail: str, now_ms: int) -> Statement:
    """Return what writes how it goes on a node."""
    sql = (
        "INSERT INTO rollout_reports (rollout, node, state, detail, at_ms) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT DO UPDATE SET state = excluded.state, detail = excluded.detail, at_ms = excluded.at_ms"
    )
    return sql, (rollout.id, node, state.value, detail, now_ms)


def forgive(rollout: Rollout) -> Statement:
    """Return what has nodes that failed take it up once more."""
    sql = "DELETE FROM rollout_reports WHERE rollout = ? AND state = ?"
    return sql, (rollout.id, State.FAILED.value)


def forget_oldest() -> list[Statement]:
    """Return what removes rollouts beyond those that are kept. The last that is done of each kind stays."""
    kept = (
        "SELECT id FROM (SELECT id FROM rollouts ORDER BY created_ms DESC, id DESC LIMIT ?)"
        " UNION SELECT id FROM rollouts AS one WHERE status = 'done' AND NOT EXISTS"
        " (SELECT 1 FROM rollouts AS later WHERE later.kind = one.kind AND later.status = 'done'"
        " AND (later.created_ms, later.id) > (one.created_ms, one.id))"
    )
    return [
        (f"DELETE FROM rollouts WHERE id NOT IN ({kept})", (KEPT,)),  # noqa: S608 - our own words
        ("DELETE FROM rollout_reports WHERE rollout NOT IN (SELECT id FROM rollouts)", ()),
    ]
