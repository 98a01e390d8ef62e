"""What nodes do about rollouts, with real files and stores: taken up in turn, watched, kept or taken back."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from isthmus.config import ProxyConfig
from isthmus.registry import RegistryError
from isthmus.rollouts import keeper
from isthmus.rollouts.course import LATE_MS, SILENT_MS
from isthmus.rollouts.errand import DIED, Errand, Errands
from isthmus.rollouts.keeper import METRICS, Order
from isthmus.rollouts.rows import KEPT
from replication.core.change import Commit, RowChange
from tests.isthmus.rollout_world import LINK_MS, STEP_MS, Node, World
from tests.isthmus.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

USUAL = ProxyConfig().queue_max
SEVEN = "[proxy]\nqueue_max = 7\n"
EIGHT = "[proxy]\nqueue_max = 8\n"
NOTES = "CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT);"
MORE = "CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT, at INTEGER);"
# A step of one node: to hear of it, to live with it, and to say so.
STEP = 1_000 + 2 * LINK_MS + 4 * STEP_MS
ALL = 4 * STEP


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Three nodes of two regions: n1 is first, then n2, then n3."""
    world = World(tmp_path)
    for name, region in (("n1", "ams"), ("n2", "ams"), ("n3", "gru")):
        world.add(name, region, '[staging]\nregions = ["ams"]')
    yield world
    world.close()


def nodes(world: World) -> tuple[Node, Node, Node]:
    one, two, three = world.nodes.values()
    return one, two, three


class TestSettings:
    async def test_each_step_takes_them_up_when_the_one_before_has_lived_with_them(
        self, world: World
    ) -> None:
        _, two, three = nodes(world)
        id_ = await three.begin(SEVEN)
        await world.advance(500)
        assert world.settings() == [7, USUAL, USUAL]
        assert three.states(id_) == {"n1": "trying"}
        await world.advance(STEP)
        assert world.settings() == [7, 7, USUAL]
        assert three.states(id_) == {"n1": "good", "n2": "trying"}
        await world.advance(2 * STEP)
        assert world.settings() == [7, 7, 7]
        assert two.end(id_) == ("done", "")
        assert two.said(id_) == dict.fromkeys(("n1", "n2", "n3"), ("good", "0 requests, 0 failed"))
        assert [node.had for node in world.nodes.values()] == [[7], [7], [7]]

    async def test_nothing_more_is_due_when_it_is_over(self, world: World) -> None:
        one = nodes(world)[0]
        await one.begin(SEVEN)
        await world.advance(STEP_MS)
        assert await one.keeper.step() is True
        await world.advance(ALL)
        assert await one.keeper.step() is False

    async def test_node_says_what_it_keeps_of_its_own(self, world: World) -> None:
        own = world.add("n4", "gru", "[proxy]\nqueue_max = 5")
        id_ = await own.begin(SEVEN)
        await world.advance(ALL)
        assert own.end(id_)[0] == "done"
        assert world.settings() == [7, 7, 7, 5]
        assert own.said(id_)["n4"][1] == "0 requests, 0 failed; keeps its own proxy.queue_max"

    @pytest.mark.parametrize("kind", ["reload_problem", "kept"])
    async def test_refusal_of_one_has_all_go_back(self, world: World, kind: str) -> None:
        one, two, three = nodes(world)
        first = await one.begin(EIGHT)
        await world.advance(ALL)
        two.allergies["7"] = kind
        id_ = await one.begin(SEVEN)
        await world.advance(ALL)
        assert world.settings() == [8, 8, 8]
        assert one.states(id_) == {"n1": "back", "n2": "failed"}
        assert one.end(id_) == ("back", f"n2: no {kind}")
        assert three.had == [8]
        assert one.end(first)[0] == "done"

    @pytest.mark.parametrize("harm", ["a worker died", "were answered with 5xx"])
    async def test_harm_on_trial_has_all_go_back(self, world: World, harm: str) -> None:
        one, two, _ = nodes(world)
        id_ = await one.begin(SEVEN)
        await world.advance(STEP)
        two.deaths += harm == "a worker died"
        two.samples += [("isthmus_requests_total", (("app", "web"), ("status", "5xx")), 30.0)]
        await world.advance(ALL)
        assert world.settings() == [USUAL] * 3
        status, reason = one.end(id_)
        assert (status, harm in reason) == ("back", True)

    async def test_later_settings_replace_all_of_earlier_ones(self, world: World) -> None:
        one = nodes(world)[0]
        await one.begin("[proxy]\nqueue_max = 7\ndrain_ms = 7")
        await world.advance(ALL)
        await one.begin(EIGHT)
        await world.advance(ALL)
        assert world.settings() == [8, 8, 8]
        assert one.config.proxy.drain_ms == ProxyConfig().drain_ms
        await one.begin("")
        await world.advance(ALL)
        assert world.settings() == [USUAL] * 3

    async def test_node_that_comes_later_takes_up_what_is_done_at_once(self, world: World) -> None:
        one = nodes(world)[0]
        id_ = await one.begin(SEVEN, bake_s=10.0)
        await world.advance(35_000)
        assert one.end(id_)[0] == "done"
        late = world.add("n4")
        late.store.apply_snapshot(one.store.snapshot(1 << 20), world.now_ms)
        await world.advance(5 * STEP_MS)
        assert late.config.proxy.queue_max == 7
        assert late.said(id_)["n4"] == ("good", "")

    async def test_node_that_comes_later_and_cannot_is_alone_and_tries_again_when_asked(
        self, world: World
    ) -> None:
        one, two, three = nodes(world)
        three.down()
        id_ = await one.begin(SEVEN)
        await world.advance(ALL)
        assert one.end(id_) == ("done", "")
        three.up()
        three.allergies["7"] = "reload_problem"
        await world.advance(STEP)
        assert world.settings() == [7, 7, USUAL]
        assert one.end(id_) == ("done", "")
        assert one.said(id_)["n3"] == ("failed", "no reload_problem")
        assert {name: value for name, _, value in three.keeper.samples()}["isthmus_rollout_failed"] == 1
        behind = {"id": id_, "kind": "config", "node": "n3", "detail": "no reload_problem"}
        assert two.keeper.describe() == {"running": None, "failed": [], "behind": [behind]}
        assert three.keeper.describe()["failed"] == [id_]
        three.allergies.clear()
        await two.keeper.retry(id_)
        await world.advance(STEP)
        assert world.settings() == [7, 7, 7]
        assert {name: value for name, _, value in three.keeper.samples()}["isthmus_rollout_failed"] == 0

    async def test_node_that_lost_its_files_takes_up_what_it_says_it_has(self, world: World) -> None:
        one, two, _ = nodes(world)
        id_ = await one.begin(SEVEN)
        await world.advance(ALL)
        two.down()
        shutil.rmtree(two.data)
        two.install()
        two.up()
        two.store.apply_snapshot(one.store.snapshot(1 << 20), world.now_ms)
        assert (two.config.proxy.queue_max, two.states(id_)["n2"]) == (USUAL, "good")
        await world.advance(5 * STEP_MS)
        assert world.settings() == [7, 7, 7]
        assert world.end(id_) == ("done", "")

    async def test_row_that_nobody_checked_is_refused_by_the_first_node(self, world: World) -> None:
        one = nodes(world)[0]
        id_ = await one.begin(SEVEN)
        sql = "UPDATE rollouts SET body = ?"
        await one.execute([(sql, ("[admin]\nlisten = '127.0.0.1:1'",))])
        await world.advance(ALL)
        assert one.end(id_)[0] == "back"
        assert "`admin.listen` cannot be rolled out" in one.end(id_)[1]
        assert one.had == []

    async def test_cancelled_one_is_taken_back_by_all_that_have_it(self, world: World) -> None:
        one, two, three = nodes(world)
        id_ = await one.begin(SEVEN)
        await world.advance(STEP + 200)
        assert one.states(id_) == {"n1": "good", "n2": "trying"}
        shown = await three.keeper.cancel(id_, "anna@host")
        assert (shown["status"], shown["reason"]) == ("back", "cancelled by anna@host")
        await world.advance(STEP)
        assert world.settings() == [USUAL] * 3
        assert two.states(id_) == {"n1": "back", "n2": "back"}
        assert three.had == []

    async def test_node_gone_on_trial_has_all_go_back_and_so_does_it_when_it_is_there_again(
        self, world: World
    ) -> None:
        one, _two, three = nodes(world)
        id_ = await one.begin(SEVEN, bake_s=60.0)
        world.step_ms = 500
        await world.advance(64_000)
        world.apart.add("n2")
        await world.advance(int(SILENT_MS) + STEP)
        assert one.end(id_) == ("back", "n2: it is gone since it has begun to try")
        assert world.settings() == [USUAL, 7, USUAL]
        world.apart.clear()
        await world.advance(STEP)
        assert world.settings() == [USUAL] * 3
        assert (three.states(id_), three.had) == ({"n1": "back", "n2": "back"}, [])

    async def test_node_that_had_passed_beyond_a_cut_goes_back_too(self, world: World) -> None:
        one = nodes(world)[0]
        id_ = await one.begin(SEVEN)
        await world.advance(STEP + 300)
        assert one.states(id_)["n2"] == "trying"
        world.apart.add("n2")
        await world.advance(int(SILENT_MS) + STEP)
        world.apart.clear()
        await world.advance(STEP)
        assert one.states(id_) == {"n1": "back", "n2": "back"}
        assert world.settings() == [USUAL] * 3

    async def test_node_that_says_nothing_has_all_go_back(self, world: World) -> None:
        one, two, _ = nodes(world)
        id_ = await one.begin(SEVEN)
        await world.advance(STEP + 300)
        step, two.keeper.step = two.keeper.step, _do_nothing  # type: ignore[method-assign]  # stalled
        world.step_ms = 1_000
        await world.advance(int(LATE_MS) + ALL)
        assert one.end(id_) == ("back", "n2: it does not say how it goes")
        two.keeper.step = step  # type: ignore[method-assign]  # as above
        await world.advance(STEP)
        assert world.settings() == [USUAL] * 3

    async def test_of_two_begun_on_two_sides_of_a_cut_one_holds_on_all(self, world: World) -> None:
        one, _, three = nodes(world)
        world.apart.add("n3")
        first = await one.begin(SEVEN)
        await world.advance(STEP_MS)
        second = await three.begin(EIGHT)
        await world.advance(300)
        world.apart.clear()
        await world.advance(ALL)
        assert (one.end(first), three.end(second)[0]) == (("done", ""), "back")
        assert world.settings() == [7, 7, 7]

    async def test_later_one_that_is_done_beyond_a_cut_holds_on_all(self, world: World) -> None:
        one, _, three = nodes(world)
        world.apart.add("n3")
        first = await one.begin(SEVEN, bake_s=10.0)
        await world.advance(STEP_MS)
        second = await three.begin(EIGHT)
        await world.advance(ALL)
        assert three.end(second) == ("done", "")
        world.apart.clear()
        await world.advance(ALL)
        assert one.end(first)[0] == "back"
        assert world.settings() == [8, 8, 8]

    async def test_failure_to_write_leaves_nothing_half_done(self, world: World) -> None:
        one = nodes(world)[0]
        id_ = await one.begin(SEVEN)
        await world.advance(300)
        one.deaths += 1
        one.failures.append(OSError("disk full"))
        await world.advance(ALL)
        assert one.failures == []
        assert one.end(id_)[0] == "back"
        assert (one.states(id_), world.settings()) == ({"n1": "failed"}, [USUAL] * 3)


async def _do_nothing() -> bool:
    return True


async def sweep(
    world: World,
    begin: Callable[[int], dict[str, Any]],
    check: Callable[[World, int, bool], None],
    stride: float = 0.5,
) -> set[Any]:
    """Have the agent of n1 die at points of a rollout that are so far apart; n2 refuses every other rollout.

    Returns what came of these: the status, and what n1 says.
    """
    one, two = world.nodes.values()
    found = set()
    for number in range(200):
        two.refuses = bool(number % 2)
        one.dies_at = -1
        id_ = await one.begin(**begin(number), bake_s=0.2)
        one.points, one.dies_at = 0, int(number * stride) + 1
        await world.advance(2_000)
        is_over = one.points < one.dies_at
        status, _ = world.end(id_)
        state = one.states(id_)["n1"]
        assert state in ({"good"} if status == "done" else {"back", "failed"}), (number, status, state)
        check(world, number, status == "done")
        found.add((status, state))
        if is_over and number % 2:
            return found
    raise AssertionError("it does not end")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    world.add("n1")
    world.add("n2")
    yield world
    world.close()


async def test_agent_that_dies_at_any_point_leaves_settings_that_all_have(pair: World) -> None:
    had = [USUAL]

    def check(world: World, number: int, is_done: bool) -> None:
        had.append(number + 1 if is_done else had[-1])
        assert world.settings() == [had[-1]] * 2, number

    found = await sweep(pair, lambda number: {"body": f"[proxy]\nqueue_max = {number + 1}"}, check)
    assert found == {("done", "good"), ("back", "failed"), ("back", "back")}


async def test_agent_that_dies_at_any_point_leaves_tables_that_all_have(pair: World) -> None:
    one, two = pair.nodes.values()
    had = [NOTES]
    await one.begin(NOTES, kind="schema")
    await pair.advance(ALL)
    two.execute_now("INSERT INTO notes VALUES (1, NULL)")  # which does not fit all tables

    asked = [""]

    def begin(number: int) -> dict[str, Any]:
        kind = "TEXT NOT NULL DEFAULT ''" if number % 2 else "TEXT"
        dropped = "".join(f"-- dropped: notes.{name}\n" for name in re.findall(r", (c\d+)", had[-1]))
        columns = f"id INTEGER PRIMARY KEY, text {kind}, c{number} TEXT"
        asked.append(f"{dropped}CREATE TABLE notes ({columns});")
        return {"kind": "schema", "body": asked[-1]}

    def check(world: World, number: int, is_done: bool) -> None:
        had.append(asked[-1] if is_done else had[-1])
        assert [node.declared() for node in world.nodes.values()] == [had[-1]] * 2, number

    found = await sweep(pair, begin, check, stride=3)
    assert found == {("done", "good"), ("back", "failed"), ("back", "back")}


class TestTables:
    async def test_each_node_s_next_agent_carries_them_out_in_turn(self, world: World) -> None:
        one, two, _ = nodes(world)
        id_ = await one.begin(NOTES, kind="schema")
        await world.advance(500)
        assert world.tables() == [True, False, False]
        assert [node.lives for node in world.nodes.values()] == [2, 1, 1]
        await world.advance(ALL)
        assert world.end(id_) == ("done", "")
        assert world.tables() == [True, True, True]
        assert [node.lives for node in world.nodes.values()] == [2, 2, 2]
        assert two.said(id_)["n2"] == ("good", "0 requests, 0 failed")
        two.down()
        two.up()
        await world.advance(STEP)
        assert world.tables() == [True, True, True]
        assert world.end(id_) == ("done", "")

    async def test_node_that_has_them_already_needs_no_other_agent(self, world: World) -> None:
        one = nodes(world)[0]
        await one.begin(NOTES, kind="schema")
        await world.advance(ALL)
        id_ = await one.begin(NOTES, kind="schema")
        await world.advance(ALL)
        assert world.end(id_) == ("done", "")
        assert [node.lives for node in world.nodes.values()] == [2, 2, 2]

    async def test_plan_that_one_node_refuses_is_undone_on_all(self, world: World) -> None:
        one, two, three = nodes(world)
        first = await one.begin(NOTES, kind="schema")
        await world.advance(ALL)
        two.execute_now("INSERT INTO notes VALUES (1, NULL)")  # which is not told
        id_ = await one.begin(NOTES.replace("TEXT", "TEXT NOT NULL DEFAULT ''"), kind="schema")
        await world.advance(ALL)
        assert world.end(first) == ("done", "")
        status, reason = world.end(id_)
        assert (status, reason.partition(":")[0]) == ("back", "n2")
        assert one.states(id_) == {"n1": "back", "n2": "failed"}
        assert three.lives == 2

    async def test_agent_that_ends_on_trial_has_them_undone_on_all(self, world: World) -> None:
        one, two, three = nodes(world)
        id_ = await one.begin(NOTES, kind="schema")
        await world.advance(STEP + 700)
        assert world.tables() == [True, True, False]
        two.down()
        two.up()
        await world.advance(STEP)
        assert world.end(id_) == ("back", f"n2: {DIED}")
        assert world.tables() == [False, False, False]
        assert three.lives == 1
        assert one.keeper._errands.read() is None

    async def test_cancelled_one_is_undone_by_all_that_have_it(self, world: World) -> None:
        one, two, _ = nodes(world)
        id_ = await one.begin(NOTES, kind="schema")
        await world.advance(STEP + 700)
        await one.keeper.cancel(id_, "")
        await world.advance(STEP)
        assert world.tables() == [False, False, False]
        assert (world.end(id_), two.states(id_)) == (("back", "cancelled"), {"n1": "back", "n2": "back"})

    async def test_errand_that_nobody_waits_for_is_not_carried_out_later(self, world: World) -> None:
        one = nodes(world)[0]
        one.down()
        Errands(one.data, one.database).put(Errand("gone", NOTES))
        one.up()  # it takes the tables, of which there is no rollout
        await world.advance(5 * STEP_MS)
        assert (one.keeper._errands.read(), world.tables()) == (None, [False, False, False])


class TestByHand:
    @pytest.mark.parametrize(
        ("order", "problem"),
        [
            ({"body": "[proxy]\nqueue_max = -1"}, "settings:2: proxy.queue_max: expected"),
            ({"body": "workers = 3"}, "`workers` cannot be rolled out"),
            ({"body": "x ="}, "settings: "),
            ({"kind": "schema", "body": "CREATE TABLE x (y)"}, "needs a primary key"),
            ({"kind": "schema", "body": "CREATE TABLE apps (y INTEGER PRIMARY KEY)"}, "isthmus's own"),
            ({"body": SEVEN, "canaries": ("n9",)}, "no node `n9` takes part; there are n1, n2, n3"),
        ],
    )
    async def test_what_makes_no_sense_is_not_begun(
        self, world: World, order: dict[str, Any], problem: str
    ) -> None:
        one = nodes(world)[0]
        with pytest.raises(RegistryError) as caught:
            await one.begin(**order)
        assert problem in str(caught.value)
        assert await one.keeper.list() == []

    @pytest.mark.parametrize(
        "order",
        [{"kind": "apps"}, {"bake_s": -1}, {"bake_s": 1e9}, {"by": "\x1b"}, {"by": "a" * 129}, {"more": 1}],
    )
    def test_orders_are_of_one_form(self, order: dict[str, Any]) -> None:
        good = {"kind": "config", "body": "", "bake_s": 0, "by": "anna@host", "canaries": ["n1"]}
        assert msgspec.convert(good, Order).bake_s == 0
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({**good, **order}, Order)

    async def test_plan_that_this_node_cannot_carry_out_is_not_begun(self, world: World) -> None:
        one = nodes(world)[0]
        await one.begin(NOTES, kind="schema")
        await world.advance(ALL)
        with pytest.raises(RegistryError, match="notes"):
            await one.begin("", kind="schema")

    async def test_only_one_runs_at_a_time(self, world: World) -> None:
        one, two, _ = nodes(world)
        id_ = await one.begin(SEVEN)
        await world.advance(2 * STEP_MS)
        with pytest.raises(RegistryError, match=f"rollout {id_} is running; wait for it, or cancel it"):
            await two.begin(EIGHT)

    async def test_dry_run_shows_steps_and_plan_and_writes_nothing(self, world: World) -> None:
        one = nodes(world)[0]
        shown = await one.keeper.begin(
            Order(kind="schema", body=NOTES, canaries=("n3",), dry_run=True, by="anna")
        )
        assert (shown["steps"], shown["plan"]) == ((("n3",), ("n1", "n2")), ["add table notes"])
        assert (shown["bake_ms"], shown["created_by"], shown["node"]) == (30_000, "anna", "n1")
        assert await one.keeper.list() == []

    async def test_rollout_is_shown_with_its_body_and_listed_without(self, world: World) -> None:
        one = nodes(world)[0]
        id_ = await one.begin(SEVEN)
        await world.advance(ALL)
        shown = await one.keeper.show(id_)
        (listed,) = await one.keeper.list()
        assert shown.pop("body") == SEVEN
        assert shown == listed
        assert [node["node"] for node in listed["nodes"]] == ["n1", "n2", "n3"]
        json.dumps(listed)

    async def test_what_is_not_there_or_over_is_refused(self, world: World) -> None:
        one = nodes(world)[0]
        for act in (one.keeper.show("x"), one.keeper.cancel("x", ""), one.keeper.retry("x")):
            with pytest.raises(RegistryError, match="there is no rollout `x`") as caught:
                await act
            assert caught.value.found is False
        id_ = await one.begin(SEVEN)
        with pytest.raises(RegistryError, match="is not done; begin another"):
            await one.keeper.retry(id_)
        await world.advance(ALL)
        with pytest.raises(RegistryError, match="is over"):
            await one.keeper.cancel(id_, "")

    async def test_rollout_of_a_node_whose_clock_is_behind_is_the_latest_all_the_same(
        self, world: World
    ) -> None:
        one = nodes(world)[0]
        await one.begin(SEVEN)
        await world.advance(ALL)
        world.behind_ms = 60_000
        id_ = await one.begin(EIGHT)
        await world.advance(ALL)
        assert (world.end(id_), world.settings()) == (("done", ""), [8, 8, 8])

    async def test_old_ones_are_forgotten_but_not_what_is_in_use(self, world: World) -> None:
        one = nodes(world)[0]
        first = await one.begin(NOTES, kind="schema")
        await world.advance(ALL)
        for number in range(KEPT + 2):
            id_ = await one.begin(SEVEN, bake_s=float(number))
            await one.keeper.cancel(id_, "")
            world.now_ms += 1
        listed = [rollout["id"] for rollout in await one.keeper.list()]
        assert (len(listed), listed[-1]) == (KEPT + 1, first)
        assert set(one.states(first)) == {"n1", "n2", "n3"}

    async def test_rows_that_cannot_be_read_are_left_out(self, world: World) -> None:
        one = nodes(world)[0]
        id_ = await one.begin(SEVEN)
        for sql in (
            "INSERT INTO rollouts (id, status) VALUES ('x', 'running')",
            "INSERT INTO rollouts (id, kind, status, steps) VALUES ('y', 'config', 'running', '5')",
            "INSERT INTO rollouts (id, kind, status, steps) VALUES ('z', 'config', 'running', x'ff')",
            f"INSERT INTO rollout_reports(rollout, node, state) VALUES ('{id_}', 'n7', 'glad')",
            f"INSERT INTO rollout_reports(rollout, node, state, detail) VALUES ('{id_}', 'n8', 'good', x'')",
            f"INSERT INTO rollout_reports(rollout, node, state, at_ms) VALUES ('{id_}', 'n9', 'good', 'x')",
        ):
            await one.execute([(sql, ())])
        await world.advance(ALL)
        assert [rollout["id"] for rollout in await one.keeper.list()] == [id_]
        assert world.end(id_) == ("done", "")
        json.dumps(await one.keeper.show(id_))
        assert set(await shown_nodes(one, id_)) == {"n1", "n2", "n3"}


async def shown_nodes(node: Node, id_: str) -> list[str]:
    return [said["node"] for said in (await node.keeper.show(id_))["nodes"]]


async def test_metrics_tell_of_what_runs(world: World) -> None:
    one = nodes(world)[0]
    await one.begin(SEVEN)
    await world.advance(STEP_MS)
    samples = {name: value for name, _, value in one.keeper.samples()}
    assert samples == {"isthmus_rollouts_running": 1, "isthmus_rollout_failed": 0}
    assert samples.keys() == METRICS.keys()
    await world.advance(ALL)
    assert {value for _, _, value in one.keeper.samples()} == {0}


async def test_keeper_goes_on_by_itself_and_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "AFTER_ERROR_S", 0.0)
    world = World(tmp_path)
    node = world.add("n1")
    await node.keeper.start()
    await eventually("it is settled", lambda: node.keeper._is_settled)
    id_ = await node.begin(SEVEN, bake_s=0.0)
    node.failures.append(OSError("disk full"))
    change = RowChange("rollouts", (id_,), ())
    node.keeper.handle_commit(Commit(1, (change,), ()))
    await eventually("it is done", lambda: node.end(id_) == ("done", ""))
    assert (node.failures, world.settings()) == ([], [7])
    await node.keeper.stop()
    world.close()
