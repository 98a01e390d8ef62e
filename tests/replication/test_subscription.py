"""The rows of a query over time: which row is which, how changes are numbered, how many are kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.core.subscription import (
    REST_MAX_MS,
    REST_MIN_MS,
    ChangeKind,
    LiveResult,
    ResumeError,
    compute_identity,
    compute_rest_ms,
    pack_cells,
    unpack_cells,
)

INSERT, UPDATE, DELETE = ChangeKind.INSERT, ChangeKind.UPDATE, ChangeKind.DELETE


def live(*rows, identity=(0,), changes_max=1000, bytes_max=1 << 20):
    made = LiveResult(identity, changes_max=changes_max, bytes_max=bytes_max)
    made.fill([pack_cells(row) for row in rows])
    return made


def move(result, *rows):
    """Bring a result to rows; returns what changed, with cells unpacked."""
    changes = result.plan_changes([pack_cells(row) for row in rows])
    result.apply_changes(changes)
    return [(c.id, c.kind, c.row_id, tuple(unpack_cells(c.cells))) for c in changes]


def test_row_that_keeps_its_key_keeps_its_id():
    result = live((1, "a"), (2, "b"))
    assert move(result, (1, "a"), (2, "c")) == [(1, UPDATE, 2, (2, "c"))]


def test_new_and_gone_rows_are_numbered_without_holes():
    result = live((1, "a"), (2, "b"))
    assert move(result, (2, "b"), (3, "c"), (4, "d")) == [
        (1, DELETE, 1, (1, "a")),
        (2, INSERT, 3, (3, "c")),
        (3, INSERT, 4, (4, "d")),
    ]
    assert move(result, (2, "b")) == [(4, DELETE, 3, (3, "c")), (5, DELETE, 4, (4, "d"))]


def test_id_of_a_gone_row_is_not_used_again():
    result = live((1,), (2,))
    move(result, (1,))
    assert move(result, (1,), (2,)) == [(2, INSERT, 3, (2,))]


def test_equal_rows_are_counted():
    result = live(("a",), ("a",))
    assert move(result, ("a",)) == [(1, DELETE, 2, ("a",))]
    assert move(result, ("a",), ("a",), ("a",)) == [(2, INSERT, 3, ("a",)), (3, INSERT, 4, ("a",))]


def test_only_row_of_an_aggregate_is_updated():
    assert move(live((3,)), (4,)) == [(1, UPDATE, 1, (4,))]


def test_order_alone_is_no_change():
    assert move(live((1,), (2,)), (2,), (1,)) == []


@pytest.mark.parametrize(
    ("before", "after"), [(1, 1.0), (0, None), ("", b""), ("a", "A"), (2**53, 2**53 + 1)]
)
def test_values_that_look_alike_are_not_the_same(before, after):
    assert move(live((7, before)), (7, after)) == [(1, UPDATE, 1, (7, after))]


def test_key_columns_say_which_row_is_which_and_the_first_one_when_there_are_none():
    assert compute_identity(("name", "ID", "n"), ["id"]) == (1,)
    assert compute_identity(("k", "v", "n"), ["n", "k"]) == (0, 2)
    assert compute_identity(("name", "n"), ["id"]) == (0,)


def test_changes_are_kept_up_to_their_number():
    result = live(changes_max=3)
    for number in range(1, 6):
        move(result, *[(n,) for n in range(number)])
    assert result.floor == 3
    assert [change.id for change in result.read_since(2, 10)] == [3, 4, 5]
    assert [change.id for change in result.read_since(2, 2)] == [3, 4]
    assert [change.id for change in result.read_since(4, 10)] == [5]
    assert result.read_since(5, 10) == []
    with pytest.raises(ResumeError, match=r"already deleted older changes, min change id: 3"):
        result.read_since(1, 10)


def test_changes_are_kept_up_to_their_size():
    result = live(bytes_max=1_500)
    for number in range(1, 5):
        move(result, *[(n, "x" * 500) for n in range(number)])
    assert result.floor == 3


def test_changes_that_come_together_are_kept_together():
    result = live(changes_max=2)
    move(result, *[(n,) for n in range(5)])
    assert [change.id for change in result.read_since(0, 10)] == [1, 2, 3, 4, 5]


def test_number_that_was_never_given_is_refused():
    with pytest.raises(ResumeError, match="there is no change 1 yet"):
        live().read_since(1, 10)


def test_restored_result_goes_on_where_it_was():
    before = live((1, "a"), changes_max=2)
    for text in "bcd":
        move(before, (1, text), (2, text))
    after = live(changes_max=2)
    after.restore(before.rows.items(), before.last_row_id, before.last_id, before.read_since(4, 10))
    assert (after.rows, after.last_id, after.floor) == (before.rows, 6, 5)
    assert move(after, (2, "d"))[0][:3] == (7, DELETE, 1)


def test_query_rests_in_proportion_within_bounds():
    assert compute_rest_ms(0.1) == REST_MIN_MS
    assert compute_rest_ms(100) == 900
    assert compute_rest_ms(10_000) == REST_MAX_MS


rows = st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["a", "b", 1, 1.0, None])), max_size=6)


@given(answers=st.lists(rows, min_size=1, max_size=8), data=st.data())
def test_replaying_changes_gives_the_answer_from_any_point(answers, data):
    result = live(*answers[0])
    seen = [(0, dict(result.rows))]
    for answer in answers[1:]:
        move(result, *answer)
        assert sorted(result.rows.values()) == sorted(map(pack_cells, answer))
        seen.append((result.last_id, dict(result.rows)))
    number, replica = data.draw(st.sampled_from(seen))
    for change in result.read_since(number, 1000):
        assert change.id == number + 1
        number = change.id
        if change.kind is INSERT:
            assert change.row_id not in replica
        if change.kind is DELETE:
            assert replica.pop(change.row_id) == change.cells
        else:
            assert change.kind is INSERT or change.row_id in replica
            replica[change.row_id] = change.cells
    assert replica == result.rows
