from replication.core.clock import Clock, Hlc, HybridClock, SiteId, compute_ms, hlc_from_ms


def test_follows_the_wall_clock():
    assert compute_ms(HybridClock().tick(5_000)) == 5_000


def test_never_goes_back_when_the_wall_clock_does():
    clock = HybridClock()
    first = clock.tick(5_000)
    assert clock.tick(1_000) > first


def test_orders_more_writes_in_a_millisecond_than_the_counter_holds():
    clock = HybridClock(hlc_from_ms(7))
    ticks = [clock.tick(7) for _ in range(70_000)]
    assert ticks == sorted(set(ticks))


def test_comes_after_what_it_observed():
    clock = HybridClock()
    clock.observe(hlc_from_ms(9_000))
    assert clock.tick(5_000) > hlc_from_ms(9_000)


def test_holds_back_only_what_is_beyond_the_drift():
    clock = HybridClock(max_drift_ms=100)
    assert not clock.is_too_far_ahead(hlc_from_ms(1_100), 1_000)
    assert clock.is_too_far_ahead(hlc_from_ms(1_101), 1_000)


def test_site_decides_between_equal_times():
    assert Clock(Hlc(1), SiteId(b"b" * 16)) > Clock(Hlc(1), SiteId(b"a" * 16))
