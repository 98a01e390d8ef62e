from __future__ import annotations

import random
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from routing.loads import IDLE_MS, ROWS_PER_S_MAX, Busy, NodeLoads, compute_rows_max
from tests.routing.rows import drop, put, row, table_with

if TYPE_CHECKING:
    from routing.target import Target


def soft_limit(_machine: str) -> int:
    return 20


def target(machine: str) -> Target:
    found = table_with(row("machines", id=machine)).machine(machine)
    assert found is not None
    return found


def settle(loads: NodeLoads, looks: int = 30) -> None:
    for _ in range(looks):
        loads.smooth(soft_limit)


def test_a_worker_tells_what_has_changed_and_only_that() -> None:
    busy, one, other = Busy(), target("m1"), target("m2")
    assert busy.collect() == []
    busy.enter(one)
    busy.enter(one)
    busy.enter(other)
    assert busy.collect() == [("m1", 2), ("m2", 1)]
    assert busy.collect() == []
    other.in_flight -= 1
    assert busy.collect() == [("m2", 0)]
    one.in_flight -= 1
    busy.enter(other)
    assert busy.collect() == [("m1", 1), ("m2", 1)]


def test_what_came_and_went_between_two_reports_is_not_told() -> None:
    busy, one = Busy(), target("m1")
    busy.enter(one)
    one.in_flight -= 1
    assert busy.collect() == []
    assert not one.watched


def test_the_next_agent_is_told_everything() -> None:
    busy, one = Busy(), target("m1")
    busy.enter(one)
    busy.collect()
    busy.forget_told()
    assert busy.collect() == [("m1", 1)]


def test_each_worker_is_told_what_the_others_have() -> None:
    loads = NodeLoads()
    for worker in ("a", "b", "c"):
        loads.add_worker(worker)
    loads.handle_counts("a", [("m1", 3)])
    loads.handle_counts("b", [("m1", 1), ("m2", 2)])
    shares, totals = loads.plan_shares()
    assert shares == {
        "a": [("m1", 1), ("m2", 2)],
        "b": [("m1", 3)],
        "c": [("m1", 4), ("m2", 2)],
    }
    assert totals == [("m1", 4), ("m2", 2)]
    assert loads.plan_shares() == ({}, [])


def test_what_a_dead_worker_had_vanishes() -> None:
    loads = NodeLoads()
    loads.add_worker("a")
    loads.add_worker("b")
    loads.handle_counts("a", [("m1", 3)])
    loads.plan_shares()
    loads.drop_worker("a")
    assert loads.plan_shares() == ({"b": [("m1", 0)]}, [("m1", 0)])
    assert loads.totals == {}


def test_a_worker_that_comes_later_is_told_what_is_there() -> None:
    loads = NodeLoads()
    loads.add_worker("a")
    loads.handle_counts("a", [("m1", 3)])
    loads.plan_shares()
    loads.add_worker("b")
    assert loads.plan_shares()[0] == {"b": [("m1", 3)]}


_EVENTS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(("m1", "m2")), st.integers(-1, 3)), max_size=40
)


@given(_EVENTS)
def test_after_a_share_every_worker_knows_exactly_what_the_others_have(
    events: list[tuple[str, str, int]],
) -> None:
    loads = NodeLoads()
    have: dict[str, dict[str, int]] = {}
    told: dict[str, dict[str, int]] = {}
    for worker, machine, count in events:
        if count < 0:
            loads.drop_worker(worker)
            have.pop(worker, None)
            told.pop(worker, None)
            continue
        if worker not in have:
            loads.add_worker(worker)
            have[worker], told[worker] = {}, {}
        loads.handle_counts(worker, [(machine, count)])
        have[worker][machine] = count
        for to, counts in loads.plan_shares()[0].items():
            told[to].update(counts)
    for to, counts in loads.plan_shares()[0].items():
        told[to].update(counts)
    for worker in have:
        for machine in ("m1", "m2"):
            others = sum(own.get(machine, 0) for name, own in have.items() if name != worker)
            assert told[worker].get(machine, 0) == others


def loaded(machine: str, count: int) -> NodeLoads:
    loads = NodeLoads()
    loads.add_worker("a")
    loads.handle_counts("a", [(machine, count)])
    settle(loads)
    return loads


def test_an_idle_node_writes_nothing() -> None:
    loads = NodeLoads()
    settle(loads)
    assert loads.plan_writes(0, soft_limit, 100) == ([], [])


def test_a_steady_load_is_written_once() -> None:
    loads = loaded("m1", 7)
    writes, _ = loads.plan_writes(0, soft_limit, 100)
    assert writes == [("m1", 7)]
    loads.confirm(0, writes, ())
    settle(loads)
    assert loads.plan_writes(500, soft_limit, 100) == ([], [])


def test_what_was_not_confirmed_is_planned_again() -> None:
    loads = loaded("m1", 7)
    assert loads.plan_writes(0, soft_limit, 100) == loads.plan_writes(500, soft_limit, 100)


def test_noise_around_a_load_writes_little() -> None:
    rng, loads = random.Random(5), loaded("m1", 10)
    written = 0
    for look in range(600):
        loads.handle_counts("a", [("m1", rng.choice((9, 10, 10, 11)))])
        loads.smooth(soft_limit)
        if not look % 5:
            writes, _ = loads.plan_writes(look, soft_limit, 100)
            loads.confirm(look, writes, ())
            written += len(writes)
    assert written <= 12


def test_a_jump_is_told_at_once_and_the_end_of_a_load_too() -> None:
    loads = loaded("m1", 2)
    loads.confirm(0, loads.plan_writes(0, soft_limit, 100)[0], ())
    loads.handle_counts("a", [("m1", 15)])
    loads.smooth(soft_limit)
    writes, _ = loads.plan_writes(500, soft_limit, 100)
    assert writes == [("m1", 15)]
    loads.confirm(500, writes, ())
    loads.handle_counts("a", [("m1", 0)])
    loads.smooth(soft_limit)
    assert loads.plan_writes(1000, soft_limit, 100) == ([("m1", 0)], [])


def test_with_little_room_those_that_differ_most_are_written() -> None:
    loads = NodeLoads()
    loads.add_worker("a")
    loads.handle_counts("a", [("m1", 5), ("m2", 19), ("m3", 9)])
    settle(loads)
    writes, _ = loads.plan_writes(0, soft_limit, 2)
    assert writes == [("m2", 19), ("m3", 9)]
    loads.confirm(0, writes, ())
    assert loads.plan_writes(500, soft_limit, 2) == ([("m1", 5)], [])


def test_a_row_that_has_said_zero_for_long_is_removed() -> None:
    loads = loaded("m1", 5)
    loads.confirm(0, loads.plan_writes(0, soft_limit, 100)[0], ())
    loads.handle_counts("a", [("m1", 0)])
    settle(loads)
    loads.confirm(1, loads.plan_writes(1, soft_limit, 100)[0], ())
    assert loads.plan_writes(IDLE_MS, soft_limit, 100) == ([], [])
    assert loads.plan_writes(IDLE_MS + 1, soft_limit, 100) == ([], ["m1"])
    loads.confirm(IDLE_MS + 1, [], ["m1"])
    assert loads.plan_writes(IDLE_MS + 2, soft_limit, 100) == ([], [])


def test_all_nodes_together_stay_under_one_bound() -> None:
    for nodes in (1, 20, 1_000):
        assert nodes * compute_rows_max(nodes, 0.5) <= ROWS_PER_S_MAX * 0.5
    assert compute_rows_max(10**6, 0.5) == 1


def test_loads_of_siblings_and_of_present_nodes_add_up() -> None:
    table = table_with(
        row("machines"),
        row("loads", node="n2", in_flight=3),
        row("loads", node="n3", in_flight=4),
        row("loads", node="n1", in_flight=50),
    )
    machine = table.machine("m1")
    assert machine is not None
    assert machine.load == 7
    table.set_siblings([("m1", 2)])
    assert machine.load == 9
    table.set_present(["n1", "n3"])
    assert machine.load == 6
    put(table, "loads", node="n2", in_flight=9)
    put(table, "loads", node="n3", in_flight=5)
    assert machine.load == 7
    table.set_present(["n2", "n3"])
    assert machine.load == 16
    table.forget_siblings()
    assert machine.load == 14


def test_a_machine_that_comes_back_has_the_loads_that_are_known_of_it() -> None:
    table = table_with(row("machines"), row("loads", node="n2", in_flight=3))
    table.set_siblings([("m1", 2)])
    drop(table, "machines")
    put(table, "machines")
    machine = table.machine("m1")
    assert machine is not None
    assert machine.load == 5


def test_no_row_says_that_a_machine_is_busy_when_it_is_not() -> None:
    loads, rows = loaded("m1", 8), {}
    for count in (8, 3, 0):
        loads.handle_counts("a", [("m1", count)])
        for _ in range(60):
            loads.smooth(lambda _: 100)
        writes, _ = loads.plan_writes(0, lambda _: 100, 100)
        rows.update(writes)
        loads.confirm(0, writes, ())
        if count == 3:
            rows["m1"] = 3
            loads.confirm(0, [("m1", 3)], ())
    assert rows == {"m1": 0}, "though a difference of 3 would not be worth a row"
