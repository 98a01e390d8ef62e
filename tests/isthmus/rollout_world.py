"""Nodes with real stores, files and keepers of rollouts, in virtual time.

What a node lives with is said by `allergies`: parts of settings that it refuses, or that a worker keeps. An
agent can be made to die at any of the points at which it writes, reloads or hands over.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from isthmus.config import Config, ConfigError
from isthmus.config_sources import load_config
from isthmus.declared import load_schema
from isthmus.reloading import Lifecycle
from isthmus.rollouts.errand import Errands
from isthmus.rollouts.keeper import Keeper, Order
from isthmus.rollouts.watch import Watch
from replication.sidetables import read_declared
from replication.store import Store
from tests.fakes.database import Answer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from isthmus.registry import Statement
    from replication.core.change import Commit, EncodedChangeset

STEP_MS = 100
LINK_MS = 100


class DiedError(BaseException):
    """The agent's process ends here."""


@dataclass
class World:
    """All nodes, and what is on its way between them."""

    directory: Path
    now_ms: int = 1_700_000_000_000
    nodes: dict[str, Node] = field(default_factory=dict)
    flying: list[tuple[int, Node, Node, EncodedChangeset]] = field(default_factory=list)
    apart: set[str] = field(default_factory=set)  # nodes beyond a cut
    step_ms: int = STEP_MS
    behind_ms: int = 0  # of the clocks on the wall

    def add(self, name: str, region: str = "ams", text: str = "") -> Node:
        self.nodes[name] = Node(self, name, region, text)
        return self.nodes[name]

    def are_linked(self, one: Node, other: Node) -> bool:
        return (one.name in self.apart) == (other.name in self.apart)

    def spread(self, sender: Node, commit: Commit | None) -> None:
        for changeset in () if commit is None else commit.changesets:
            for node in self.nodes.values():
                if node is not sender:
                    self.flying.append((self.now_ms + LINK_MS, sender, node, changeset))

    async def advance(self, ms: int) -> None:
        until_ms = self.now_ms + ms
        while self.now_ms < until_ms:
            self.now_ms += self.step_ms
            for item in list(self.flying):
                at_ms, sender, node, changeset = item
                if at_ms <= self.now_ms and node.is_up and self.are_linked(sender, node):
                    self.flying.remove(item)
                    node.store.apply([changeset], self.now_ms)
            for node in self.nodes.values():
                if node.is_up:
                    await node.step()

    def settings(self) -> list[int]:
        return [node.config.proxy.queue_max for node in self.nodes.values()]

    def tables(self) -> list[bool]:
        return ["notes" in load_schema(node.database).tables for node in self.nodes.values()]

    def end(self, id_: str) -> tuple[str, str]:
        """Return status and reason, on which all nodes must agree, as on what each says."""
        ((end, _),) = {(node.end(id_), str(node.said(id_))) for node in self.nodes.values()}
        return end

    def close(self) -> None:
        for node in self.nodes.values():
            node.down()


class _Mortal:
    """Stands before files, and counts what is done to them as points at which the agent may die."""

    def __init__(self, node: Node, files: Any) -> None:
        self._node = node
        self._files = files

    def __getattr__(self, name: str) -> Any:
        def act(*args: Any) -> Any:
            self._node.pass_point()
            done = getattr(self._files, name)(*args)
            self._node.pass_point()
            return done

        return act


class Node:
    """One node: its files, and the agent that has them, with the control of its processes."""

    def __init__(self, world: World, name: str, region: str, text: str) -> None:
        self.world = world
        self.name = name
        self.region = region
        self.data = world.directory / name
        self.file = self.data / "isthmus.toml"
        self.text = f'node = "{name}"\nregion = "{region}"\ndata = "{self.data}"\n{text}'
        self.install()
        self.database = self.config.database
        self.lifecycle = Lifecycle()
        self.allergies: dict[str, str] = {}  # to part of the settings: `reload_problem` or `kept`
        self.refuses = False  # all settings, and all tables
        self.had: list[int] = []  # the setting after each reload
        self.samples: list[tuple[str, tuple[tuple[str, str], ...], float]] = []
        self.deaths = 0  # of workers
        self.failures: list[Exception] = []  # raised by the next writes, one each
        self.lives = 0
        self.points = 0  # at which it could have died
        self.dies_at = -1
        self.is_up = False
        self.up()

    def install(self) -> None:
        """Make the directory of the node, and start its processes but for the agent."""
        self.data.mkdir()
        self.file.write_text(self.text)
        self.config: Config = load_config(self.file, {}, {}, is_start=True)

    def up(self) -> None:
        """Start an agent."""
        self.lives += 1
        self.is_lost = asyncio.Event()
        Errands(self.data, self.database).carry_out()
        self.store = Store.open(self.database, load_schema(self.database))
        self.keeper = Keeper(
            self,
            self,
            lambda: self.config,
            present=self.present,
            watch=lambda: Watch(lambda: self.samples, lambda: self.deaths, dict),
            restart=self.restart,
            now_ms=lambda: self.world.now_ms,
            wall_ms=lambda: self.world.now_ms - self.world.behind_ms,
        )
        self.keeper._overlay = _Mortal(self, self.keeper._overlay)  # type: ignore[assignment]  # stands in
        self.keeper._errands = _Mortal(self, self.keeper._errands)  # type: ignore[assignment]  # stands in
        self.is_up = True

    def down(self) -> None:
        """End the agent."""
        if self.is_up:
            self.store.close()
        self.is_up = False

    def present(self) -> dict[str, str]:
        others = self.world.nodes.values()
        return {n.name: n.region for n in others if n.is_up and self.world.are_linked(self, n)}

    def pass_point(self) -> None:
        self.points += 1
        if self.points == self.dies_at:
            raise DiedError

    def restart(self) -> None:
        self.pass_point()
        self.is_lost.set()

    async def step(self) -> None:
        """Have the keeper do what is due; an agent that ends is followed by another."""
        step = asyncio.create_task(self._step())
        lost = asyncio.create_task(self.is_lost.wait())
        await asyncio.wait((step, lost), return_when=asyncio.FIRST_COMPLETED)
        ends = self.is_lost.is_set() or step.result()
        for task in (step, lost):
            task.cancel()
        await asyncio.gather(step, lost, return_exceptions=True)
        if ends:
            self.down()
            self.up()

    async def _step(self) -> bool:
        try:
            await self.keeper.step()
        except DiedError:
            return True
        except OSError:
            pass  # it waits, and tries again
        return False

    def said(self, id_: str) -> dict[str, tuple[str, str]]:
        sql = "SELECT node, state, detail FROM rollout_reports WHERE rollout = ? ORDER BY node"
        rows = self.store.connection.execute(sql, (id_,)).fetchall()
        return {node: (state, detail) for node, state, detail in rows}

    def states(self, id_: str) -> dict[str, str]:
        return {node: state for node, (state, _) in self.said(id_).items()}

    def end(self, id_: str) -> tuple[str, str]:
        sql = "SELECT status, reason FROM rollouts WHERE id = ?"
        status, reason = self.store.connection.execute(sql, (id_,)).fetchone()
        return status, reason

    async def begin(self, body: str, **order: Any) -> str:
        """Begin a rollout, of settings if nothing else is said; returns its id."""
        order = {"kind": "config", "bake_s": 1.0, **order}
        begun = await self.keeper.begin(Order(body=body, **order))
        return str(begun["id"])

    # What a keeper needs of a database and of who keeps the processes

    async def execute(self, statements: Sequence[Statement]) -> None:
        self.pass_point()
        if self.failures:
            raise self.failures.pop(0)
        _, commit = self.store.execute(statements, self.world.now_ms)
        self.world.spread(self, commit)
        self.pass_point()

    def declared(self) -> str:
        """Return the schema file that the tables are of."""
        return read_declared(self.store.connection)

    def execute_now(self, sql: str) -> None:
        """Write what no other node hears of."""
        self.store.execute([(sql, ())], self.world.now_ms)

    async def query(self, sql: str) -> Answer:
        return Answer([], self.store.connection.execute(sql).fetchall())

    async def upgrade(self) -> None:
        raise AssertionError("nobody asks for that")

    async def reload(self) -> Lifecycle:
        self.pass_point()
        text = (self.data / "rolled-out.toml").read_text() if (self.data / "rolled-out.toml").exists() else ""
        told = next((kind for part, kind in self.allergies.items() if part in text), "")
        self.lifecycle = Lifecycle()
        if self.refuses and text:
            told = "reload_problem"
        if told:
            self.lifecycle = Lifecycle(**{told: f"no {told}"})
        if told != "reload_problem":
            try:
                self.config = load_config(self.file, {}, {})
            except ConfigError as error:
                self.lifecycle = Lifecycle(reload_problem=str(error))
        self.had.append(self.config.proxy.queue_max)
        self.pass_point()
        return self.lifecycle
