"""Which failures are told again."""

from replication.core.repeats import AGAIN_MS, Repeats


def test_the_same_failure_is_told_once_in_a_while() -> None:
    repeats = Repeats()
    told = [at for at in range(0, 150_000, 100) if repeats.is_news("apply", "malformed", at)]
    assert told == [0, AGAIN_MS, 2 * AGAIN_MS]


def test_another_failure_is_told_at_once() -> None:
    repeats = Repeats()
    assert repeats.is_news("apply", "malformed", 0)
    assert repeats.is_news("apply", "no such table", 1)
    assert repeats.is_news("sync", "no such table", 1)
    assert not repeats.is_news("sync", "no such table", 2)
