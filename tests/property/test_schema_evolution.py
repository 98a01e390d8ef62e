"""Replicas whose schemas evolve one after another, with writes all the while, are equal in the end."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replication.core.clock import SiteId
from replication.schema import Schema
from replication.schema_apply import apply_plan
from replication.schema_plan import plan_schema
from replication.schema_rollback import rollback
from replication.store import Store

NOW = 1_000_000
KEYS = 3
VALUES = ["", "x", "7", "007", 1, 2.5, b"b", None]


@dataclass(frozen=True)
class Column:
    """One column as a schema file has it."""

    name: str
    declared: str = "TEXT"
    formers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Version:
    """One version of the schema file, and what makes the next one of it."""

    number: int = 0
    table: str = "t0"
    formers: tuple[str, ...] = ()
    mode: str = "row"
    columns: tuple[Column, ...] = (Column("a0"), Column("b0"))
    dropped: tuple[str, ...] = ()
    has_index: bool = False
    sql: str = field(init=False, compare=False, default="")

    def __post_init__(self) -> None:
        lines = [f"-- dropped: {self.table}.{name}" for name in self.dropped]
        lines += [f"-- renamed from: {name}" for name in self.formers]
        parts = ["k INTEGER PRIMARY KEY"]
        for column in self.columns:
            formers = "".join(f"-- renamed from: {name}\n" for name in column.formers)
            parts.append(f"\n{formers}{column.name} {column.declared}")
        lines += [f"-- merge: {self.mode}", f"CREATE TABLE {self.table} ({','.join(parts)});"]
        if self.has_index:
            lines.append(f"CREATE INDEX i ON {self.table} ({self.columns[0].name});")
        object.__setattr__(self, "sql", "\n".join(lines))

    def evolve(self, kind: str) -> Version:
        number = self.number + 1
        first, *rest = self.columns
        changes: dict[str, object] = {}
        if kind == "add":
            changes["columns"] = (*self.columns, Column(f"c{number}"))
        elif kind == "drop" and rest:
            changes.update(columns=tuple(rest), dropped=(*self.dropped, first.name, *first.formers))
        elif kind == "rename":
            renamed = replace(first, name=f"r{number}", formers=(first.name, *first.formers))
            changes["columns"] = (*rest, renamed)
        elif kind == "retype":
            # Once for each column: a value on its way is converted only by the types that are there by then.
            changes["columns"] = (*rest, replace(first, declared="NUMERIC"))
        elif kind == "table":
            changes.update(table=f"t{number}", formers=(self.table, *self.formers))
        elif kind == "mode":
            changes["mode"] = "column"
        elif kind == "index":
            changes["has_index"] = True
        return replace(self, number=number, **changes)


class Replica:
    """One file under one version of the schema."""

    def __init__(self, directory: Path, index: int, version: Version) -> None:
        self.path = directory / f"{index}.db"
        self.site = SiteId(bytes([65 + index]) * 16)
        self.open(version)

    def open(self, version: Version) -> None:
        self.version = version
        self.store = Store.open(self.path, Schema.parse(version.sql), site=self.site)
        self.store.connection.execute("PRAGMA synchronous = OFF")

    def evolve(self, version: Version, now: int) -> None:
        connection = self.store.connection
        apply_plan(connection, plan_schema(connection, Schema.parse(version.sql)))
        self.store.close()
        self.open(version)
        self.store.retry_parked(now)

    def undo(self, version: Version) -> None:
        rollback(self.store.connection)
        self.store.close()
        self.open(version)

    def write(self, kind: str, key: int, place: int, value: object, now: int) -> None:
        table = self.version.table
        column = self.version.columns[place % len(self.version.columns)].name
        statement = {
            "insert": (f"INSERT OR IGNORE INTO {table} (k, {column}) VALUES (?, ?)", (key, value)),
            "replace": (f"REPLACE INTO {table} (k, {column}) VALUES (?, ?)", (key, value)),
            "update": (f"UPDATE {table} SET {column} = ?2 WHERE k = ?1", (key, value)),
            "delete": (f"DELETE FROM {table} WHERE k = ?", (key,)),
        }[kind]
        self.store.execute([statement], now)

    def pull(self, other: Replica, now: int) -> None:
        for site, ranges in other.store.seen().items():
            mine = self.store.seen().get(site)
            for first, last in mine.missing(ranges.last) if mine else [(1, ranges.last)]:
                self.store.apply(other.store.read_log(site, first, last, 1 << 30), now)

    def read(self) -> tuple[str, bytes, list[str]]:
        table = self.version.table
        columns = ", ".join(["k", *sorted(column.name for column in self.version.columns)])
        rows = self.store.connection.execute(f"SELECT {columns} FROM {table} ORDER BY k").fetchall()
        return repr(rows), self.store.digest(table), [parked.reason for parked in self.store.parked()]


replicas = st.integers(0, 1)
evolutions = st.lists(
    st.sampled_from(["add", "drop", "rename", "retype", "table", "mode", "index"]), min_size=1, max_size=5
)
writes = st.tuples(
    st.just("write"),
    replicas,
    st.tuples(
        st.sampled_from(["insert", "replace", "update", "update", "delete"]),
        st.integers(1, KEYS),
        st.integers(0, 3),
        st.sampled_from(VALUES),
    ),
)
steps = st.lists(
    st.one_of(
        writes, writes, st.tuples(st.sampled_from(["evolve", "sync"]), replicas, st.none())
    ),
    max_size=30,
)  # fmt: skip
PROFILE = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def make_versions(kinds: list[str]) -> list[Version]:
    versions = [Version()]
    for kind in kinds:
        versions.append(versions[-1].evolve(kind))
    return versions


@PROFILE
@given(kinds=evolutions, steps=steps)
def test_replicas_that_evolve_in_their_own_time_are_equal_in_the_end(kinds, steps):
    versions = make_versions(kinds)
    with tempfile.TemporaryDirectory() as directory:
        both = [Replica(Path(directory), index, versions[0]) for index in (0, 1)]
        now = NOW
        for what, index, write in [*steps, *[("evolve", index, None) for index in (0, 1) for _ in kinds]]:
            now += 10
            replica = both[index]
            if what == "write":
                replica.write(*write, now)
            elif what == "sync":
                replica.pull(both[1 - index], now)
            elif replica.version is not versions[-1]:
                replica.evolve(versions[replica.version.number + 1], now)
        for replica in (*both, *both):
            replica.pull(both[1 - both.index(replica)], now)
        found = [replica.read() for replica in both]
        for replica in both:
            replica.store.close()
    assert found[0] == found[1]
    assert found[0][2] == []


@PROFILE
@given(kinds=evolutions, steps=steps)
def test_plans_that_are_undone_leave_what_was_before_them(kinds, steps):
    versions = make_versions(kinds)
    with tempfile.TemporaryDirectory() as directory:
        replica = Replica(Path(directory), 0, versions[0])
        for now, (what, _, write) in enumerate(steps, NOW):
            if what == "write":
                replica.write(*write, now)
        before = []
        for version in versions[1:]:
            before.append((replica.version, replica.read()))
            replica.evolve(version, NOW * 2)
        for version, found in reversed(before):
            replica.undo(version)
            assert replica.store.capture(NOW * 2) is None
            assert replica.read() == found
        replica.store.close()


@PROFILE
@given(kinds=evolutions, steps=steps)
def test_a_plan_that_is_undone_after_writes_leaves_nodes_equal(kinds, steps):
    versions = make_versions(kinds)
    with tempfile.TemporaryDirectory() as directory:
        both = [Replica(Path(directory), index, versions[0]) for index in (0, 1)]
        now = NOW
        for what, index, write in steps:
            now += 10
            if what == "write":
                both[index].write(*write, now)
            elif what == "sync":
                both[index].pull(both[1 - index], now)
            elif both[0].version is not versions[-1]:
                both[0].evolve(versions[both[0].version.number + 1], now)
        while both[0].version.number:
            both[0].undo(versions[both[0].version.number - 1])
            both[0].store.capture(now)
        for replica in (*both, *both):
            replica.pull(both[1 - both.index(replica)], now)
        found = [replica.read()[:2] for replica in both]
        for replica in both:
            replica.store.close()
    assert found[0] == found[1]
