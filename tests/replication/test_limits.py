"""Who has to wait, and how long."""

import pytest

from replication.core.change import EncodedChangeset
from replication.core.clock import SiteId
from replication.core.limits import (
    ALL,
    BURST_S,
    DEBT_S_MAX,
    ORIGINS_MAX,
    ORIGINS_NAMED,
    Bucket,
    OriginLimits,
    OriginSettings,
    WriteLimits,
)

LOUD, QUIET = SiteId(b"l" * 16), SiteId(b"q" * 16)


def make(site: SiteId, size: int = 10) -> EncodedChangeset:
    return EncodedChangeset(site, 1, b"x" * size)


def spend_all(limits: OriginLimits, site: SiteId, now_ms: float, size: int = 10) -> int:
    count = 0
    while limits.admit(make(site, size), now_ms):
        count += 1
    return count


def test_a_burst_passes_and_then_the_rate():
    bucket = Bucket(100, 0)
    bucket.spend(100 * BURST_S, 0)
    assert bucket.compute_wait_ms(0) == 10
    assert bucket.compute_wait_ms(9) == pytest.approx(1)
    assert bucket.compute_wait_ms(11) == 0
    bucket.spend(1, 11)
    assert bucket.compute_wait_ms(11) == pytest.approx(9)


def test_what_is_more_than_all_passes_and_is_paid_off_within_a_bound():
    bucket = Bucket(100, 0)
    bucket.spend(10**9, 0)
    assert bucket.compute_wait_ms(0) == DEBT_S_MAX * 1000 + 10
    assert bucket.compute_wait_ms(DEBT_S_MAX * 1000 + 11) == 0


def test_a_quiet_time_saves_up_no_more_than_a_burst():
    bucket = Bucket(100, 0)
    bucket.spend(100 * BURST_S, 1_000_000)
    assert bucket.compute_wait_ms(1_000_000) > 0


def test_a_rate_below_the_burst_of_one_still_lets_through():
    bucket = Bucket(0.1, 0)
    assert bucket.compute_wait_ms(0) == 0
    bucket.spend(1, 0)
    assert bucket.compute_wait_ms(0) == pytest.approx(10_000)


def test_a_write_comes_under_the_limits_of_the_tables_that_it_names_and_of_all():
    limits = WriteLimits({"machines": 5, "checks": 5, "off": 0, ALL: 5}, 0)
    assert limits.find('INSERT INTO "Machines" SELECT * FROM off') == ["machines", ALL]
    assert WriteLimits({"machines": 0}, 0).find("DELETE FROM machines") == []


def test_a_limit_that_is_used_up_refuses_and_says_for_how_long():
    limits = WriteLimits({"a": 10, ALL: 1_000}, 0)
    assert limits.begin(["a", ALL], 0) is None
    limits.end(["a", ALL])
    limits.spend("a", 120, 0)
    limits.spend(ALL, 120, 0)
    refusal = limits.begin(["a", ALL], 0)
    assert refusal == ("a", 10, 10_100)
    assert limits.begin([ALL], 0) is None, "other tables go on"
    assert limits.begin(["a"], 10_101) is None
    assert limits.refused == {"a": 1}


def test_what_is_under_way_counts_before_it_is_known_how_much_it_is():
    limits = WriteLimits({ALL: 10}, 0)
    for _ in range(20):
        assert limits.begin([ALL], 0) is None
    assert limits.begin([ALL], 0) is not None
    limits.end([ALL])
    assert limits.begin([ALL], 0) is None


def test_rows_of_a_table_count_for_it_and_for_all_together():
    limits = WriteLimits({"a": 10, ALL: 20}, 0)
    limits.spend_tables(["a"] * 20, 0)
    assert limits.compute_exhausted(["a", "b"], 0) == {"a"}
    limits.spend_tables(["b"] * 20, 0)
    assert limits.compute_exhausted(["a", "b"], 0) == {"a", "b"}
    assert limits.compute_exhausted(["b"], 501) == frozenset()


def test_an_origin_above_its_rate_is_not_taken_in_and_others_are():
    limits = OriginLimits(OriginSettings(changesets_per_s=10, bytes_per_s=0))
    assert spend_all(limits, LOUD, 0) == 20
    assert limits.is_over(LOUD, 0)
    assert limits.admit(make(QUIET), 0)
    assert not limits.is_over(QUIET, 0)
    assert limits.refused == {LOUD: 1}
    assert limits.admit(make(LOUD), 101)


def test_bytes_count_too():
    limits = OriginLimits(OriginSettings(changesets_per_s=0, bytes_per_s=1_000))
    assert spend_all(limits, LOUD, 0, size=500) == 4
    assert spend_all(OriginLimits(OriginSettings()), LOUD, 0, size=1 << 20) == 32


def test_without_limits_all_is_taken_in():
    limits = OriginLimits(OriginSettings(0, 0))
    assert all(limits.admit(make(LOUD, 1 << 20), 0) for _ in range(1_000))


def test_memory_is_bounded_however_many_origins_there_are():
    limits = OriginLimits(OriginSettings(changesets_per_s=0.1))
    for number in range(ORIGINS_MAX + 10):
        for _ in range(3):
            limits.admit(make(SiteId(number.to_bytes(16))), 0)
    assert len(limits) == ORIGINS_MAX
    assert len(limits.refused) == ORIGINS_NAMED + 1
    assert limits.refused[None] == 2 * (ORIGINS_MAX + 10 - ORIGINS_NAMED)
