"""Releases as rows, and what each step of a deploy writes.

Decides the SQL of every action, as one transaction with the position that it leads to. Refuses to know when
one is due (`course`) and who carries it out (`conductor`). Invariant: traffic moves in the one transaction of
a flip, so no node ever knows half of it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from isthmus.config_machines import MachineConfig
from isthmus.config_values import ValueOfKeyError
from isthmus.deploys.course import Action, Course, Kind, Position, Settings, Status
from isthmus.deploys.plan import UNAVAILABLE_USUAL, Batch
from routing.catalog import RELEASE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from isthmus.registry import Database, Statement

# Whose machines a deploy may remove again, once no release that one could go back to has them.
OWNER: Final = "release"
REASON: Final = "deploy"
# Every node keeps them.
KEPT: Final = 50

Seconds = Annotated[float, Meta(ge=0, le=86_400)]


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What somebody wants to be deployed. Without `machines`, those that the app has take it up.

    `to`: go back to that version; 0 is the one before the current one, None is no rollback.
    """

    app: str
    release: str = ""
    strategy: Literal["rolling", "canary", "bluegreen"] = "rolling"
    machines: tuple[MachineConfig, ...] = ()
    to: Annotated[int, Meta(ge=0)] | None = None
    by: Annotated[str, Meta(max_length=128)] = ""
    max_unavailable: Annotated[float, Meta(gt=0, le=1_000_000)] = UNAVAILABLE_USUAL
    ready_s: Seconds = 300.0
    watch_s: Seconds | None = None
    drain_s: Seconds = 10.0

    def __post_init__(self) -> None:
        if self.release and RELEASE.fullmatch(self.release) is None:
            raise ValueOfKeyError("release", f"`{self.release}` is no tag or image")
        if re.fullmatch(r"[ -~]*", self.by) is None:
            raise ValueOfKeyError("by", "who asks is told in printable ASCII")

    @property
    def settings(self) -> Settings:
        """How long its steps may take; a canary, and all of blue-green, are watched for longer."""
        watch_s = 2.0 if self.watch_s is None else self.watch_s
        longer = 2.0 if self.strategy == "rolling" else 10.0
        first_s = longer if self.watch_s is None else self.watch_s
        return Settings(self.ready_s, watch_s=watch_s, first_watch_s=first_s, drain_s=self.drain_s)


class Saved(msgspec.Struct, frozen=True):
    """What of a course is written: enough to go on with it."""

    batches: tuple[Batch, ...] = ()
    settings: Settings = Settings()
    before: int = 0  # the version that machines with a driver go back to, and what it is called
    before_release: str = ""
    position: Position = Position()


class Release(msgspec.Struct, frozen=True):
    """A row of `releases`."""

    app: str
    version: int
    created_ms: int
    created_by: str
    node: str
    release: str
    strategy: str
    status: Status
    problem: str
    finished_ms: int
    machines: tuple[str, ...]
    course: Saved

    @property
    def is_running(self) -> bool:
        """True while somebody conducts it, or should."""
        return self.status in {Status.RUNNING, Status.ROLLING_BACK}

    def make_course(self) -> Course:
        """Return its course, where it was last written."""
        saved = self.course
        return Course(
            saved.batches,
            saved.settings,
            version=self.version,
            before=saved.before,
            position=saved.position,
            problem=self.problem,
        )

    def describe(self) -> dict[str, Any]:
        """Return it as people see it."""
        shown = msgspec.to_builtins(self)
        del shown["course"]
        position = self.course.position
        return {
            **shown,
            "batches": len(self.course.batches),
            "batch": position.index,
            "stage": position.stage.value,
        }


_COLUMNS: Final = ", ".join(Release.__struct_fields__)
_JSON: Final = ("machines", "course")


async def read_releases(database: Database, app: str = "", node: str = "") -> list[Release]:
    """Return the releases of an app, or those that a node conducts, or all: the newest first.

    Rows that cannot be read are left out: any client may write them.
    """
    sql = (
        f"SELECT {_COLUMNS} FROM releases WHERE (? = '' OR app = ?) AND (? = '' OR node = ?)"  # noqa: S608 — our own names
        " ORDER BY created_ms DESC, app, version DESC"
    )
    found = []
    for row in (await database.query(sql, (app, app, node, node))).rows:
        fields = dict(zip(Release.__struct_fields__, row, strict=True))
        try:
            fields |= {name: msgspec.json.decode(fields[name]) for name in _JSON}
            found.append(msgspec.convert(fields, Release))
        except (msgspec.MsgspecError, TypeError):
            continue
    return found


def find_current(releases: Iterable[Release]) -> Release | None:
    """Return the last release of an app that is complete."""
    complete = [release for release in releases if release.status is Status.COMPLETE]
    return max(complete, key=lambda release: release.version, default=None)


def put_release(release: Release) -> Statement:
    """Return what writes a new release."""
    fields = {name: getattr(release, name) for name in Release.__struct_fields__}
    fields |= {name: _encode(fields[name]) for name in _JSON}
    fields["status"] = release.status.value
    marks = ", ".join("?" * len(fields))
    return (f"INSERT INTO releases ({_COLUMNS}) VALUES ({marks})", tuple(fields.values()))  # noqa: S608 — our own names


def abandon(release: Release, why: str, now_ms: int) -> Statement:
    """Return what gives up a release whose node is gone."""
    sql = "UPDATE releases SET status = ?, problem = ?, finished_ms = ? WHERE app = ? AND version = ?"
    return (sql, (Status.ABANDONED.value, why, now_ms, release.app, release.version))


def cordon(machines: Sequence[str], *, cordoned: bool) -> list[Statement]:
    """Return what takes machines out, or lets requests come to them."""
    if not machines:
        return []
    sql = f"UPDATE machines SET cordoned = ? WHERE id IN ({_marks(machines)})"  # noqa: S608 — only marks
    return [(sql, (int(cordoned), *machines))]


def plan_writes(
    release: Release, action: Action, node: str, now_ms: int, resting: Collection[str]
) -> list[Statement]:
    """Return the transaction of an action. `resting` machines take the release up without being started."""
    batch, statements = action.batch, []
    if action.kind is Kind.PREPARE:
        saved = release.course
        version, name = release.version, release.release
        if action.status is Status.ROLLING_BACK:
            version, name = saved.before, saved.before_release
        for machine in batch.new:
            started = machine not in resting
            statements += run(machine, version, name, node, now_ms, REASON, is_started=started)
    elif action.kind is Kind.FLIP and not batch.in_place:
        statements += cordon(batch.new, cordoned=False) + cordon(batch.old, cordoned=True)
    elif action.kind is Kind.RETIRE:
        statements += retire(batch.old, node, now_ms, REASON)
    elif action.kind is Kind.REST:
        statements += _set_state(batch.old, "stopped", now_ms)
    saved = msgspec.structs.replace(release.course, position=action.then)
    finished_ms = now_ms if action.kind is Kind.FINISH else 0
    sql = (
        "UPDATE releases SET status = ?, problem = ?, finished_ms = ?, course = ?"
        " WHERE app = ? AND version = ? AND node = ?"
    )
    told = (action.status.value, action.problem, finished_ms, _encode(saved))
    return [*statements, (sql, (*told, release.app, release.version, node))]


def plan_cleaning(app: str, keep: Collection[str], version: int) -> list[Statement]:
    """Return what removes machines of releases that nobody goes back to, and the oldest releases."""
    gone = (
        "SELECT id FROM machines WHERE app = ? AND managed_by = ? AND cordoned = 1 AND state = 'stopped'"  # noqa: S608 — only marks
        f" AND id NOT IN ({_marks(keep)})"
    )
    values = (app, OWNER, *keep)
    return [
        (f"DELETE FROM goals WHERE machine IN ({gone})", values),  # noqa: S608 — see above
        (f"DELETE FROM machines WHERE id IN ({gone})", values),  # noqa: S608 — see above
        ("DELETE FROM releases WHERE app = ? AND version <= ?", (app, version - KEPT)),
    ]


def run(
    machine: str, version: int, name: str, node: str, now_ms: int, reason: str, *, is_started: bool = True
) -> list[Statement]:
    """Return what has a machine run a release, or take it up for its next start."""
    goal = (
        "INSERT INTO goals (machine, state, asked_by, reason, asked_ms, version, release)"
        " SELECT id, ?, ?, ?, ?, ?, ? FROM machines WHERE id = ? AND driver != ''"
        " ON CONFLICT DO UPDATE SET version = excluded.version, release = excluded.release"
    )
    if is_started:
        goal += (
            ", state = excluded.state, asked_by = excluded.asked_by, reason = excluded.reason,"
            " asked_ms = excluded.asked_ms"
        )
    state = "started" if is_started else "stopped"
    values = (state, node, reason, now_ms, version, name, machine)
    return [(goal, values), *(_set_state([machine], state, now_ms) if is_started else [])]


def retire(machines: Sequence[str], node: str, now_ms: int, reason: str) -> list[Statement]:
    """Return what has machines finish what they have, and then stop where they have a driver."""
    if not machines:
        return []
    sql = (
        "UPDATE goals SET state = 'stopped', asked_by = ?, reason = ?, asked_ms = ?"  # noqa: S608 — only marks
        f" WHERE machine IN (SELECT id FROM machines WHERE driver != '' AND id IN ({_marks(machines)}))"
    )
    return [(sql, (node, reason, now_ms, *machines)), *_set_state(machines, "draining", now_ms)]


def _set_state(machines: Sequence[str], state: str, now_ms: int) -> list[Statement]:
    """Machines without a driver are what their row says."""
    if not machines:
        return []
    sql = (
        "UPDATE machines SET state = ?, since_ms = ?"  # noqa: S608 — only marks
        f" WHERE driver = '' AND state != ? AND id IN ({_marks(machines)})"
    )
    return [(sql, (state, now_ms, state, *machines))]


def _encode(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _marks(values: Collection[str]) -> str:
    return ", ".join("?" * len(values))
