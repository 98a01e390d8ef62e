"""Laws of the table: it is a function of its rows, and machines stay with their app."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from routing.balancer import Balancer, Refusal, Want
from routing.table import RoutingTable
from routing.types import WEIGHT_USUAL, MachineState
from tests.routing.rows import row

if TYPE_CHECKING:
    from routing.types import Row

APPS = ("web", "api")
REGIONS = ("ams", "iad", "lab")
MACHINES = ("m1", "m2", "m3")
ASLEEP = tuple(state for state in MachineState if state is not MachineState.STARTED)
Change = tuple[str, "Row", "Row | None"]


def _changes() -> st.SearchStrategy[Change]:
    app, machine = st.sampled_from(APPS), st.sampled_from(MACHINES)
    node, region = st.sampled_from(("n1", "n2", "n3")), st.sampled_from(REGIONS)
    rows = st.one_of(
        st.builds(row, st.just("apps"), name=app, network=st.sampled_from(("default", "other", "not one"))),
        st.builds(
            row,
            st.just("services"),
            app=app,
            port=st.sampled_from((0, 80)),
            hard_limit=st.sampled_from((None, 2, 0)),
        ),
        st.builds(
            row,
            st.just("hostnames"),
            hostname=st.sampled_from(("a.test", "*.test", "*", "BAD")),
            path_prefix=st.sampled_from(("/", "/x")),
            app=app,
        ),
        st.builds(
            row,
            st.just("machines"),
            id=machine,
            app=app,
            region=region,
            address=st.sampled_from(("10.0.0.1:1", "10.0.0.2", "bad:0")),
            state=st.sampled_from(("started", "stopped", "draining", "starting")),
            cordoned=st.sampled_from((0, 0, 1)),
            driver=st.sampled_from(("", "process")),
            weight=st.sampled_from((WEIGHT_USUAL, 200, 0)),
        ),
        st.builds(
            row,
            st.just("checks"),
            machine=machine,
            name=st.sampled_from(("c1", "c2")),
            status=st.sampled_from(("passing", "warning", "critical")),
        ),
        st.builds(row, st.just("loads"), machine=machine, node=node, in_flight=st.integers(-1, 3)),
        st.builds(row, st.just("nodes"), id=node, region=region),
        st.builds(row, st.just("regions"), code=st.just("lab"), latitude=st.sampled_from((0.0, 50.0, 99.0))),
    )
    return st.builds(lambda one, gone: (one[0], one[1], None if gone else one[2]), rows, st.booleans())


# Machines side by side, so that leaving a pool from its middle is common.
_BASE = [row("machines", id=machine) for machine in MACHINES]


def _view(table: RoutingTable) -> object:
    """Everything that can be seen of a table, without the order of anything."""
    return {
        "apps": {
            app.name: (
                app.row,
                {
                    port: (s.internal_port, s.soft_limit, s.hard_limit, s.network)
                    for port, s in app.services.items()
                },
                {
                    region: (
                        sorted(target.id for target in bucket.targets()),
                        sorted(target.id for target in bucket.ready),
                        sorted(target.id for target in bucket.reserve),
                        sorted(target.id for target in bucket.asleep),
                    )
                    for region, bucket in app.buckets.items()
                },
            )
            for app in table.apps()
        },
        "targets": {
            t.id: (t.app, t.node, t.region, t.address, t.state, t.cordoned, t.healthy, dict(t.checks), t.load)
            for t in table.targets()
        },
        "routes": sorted(table.routes()),
        "rejected": table.rejected,
        "regions": [(code, table.regions.get(code)) for code in table.regions.codes()],
        "known": [table.knows_region(code) for code in REGIONS],
        "found": [
            (found.app, found.port) if (found := table.find(host, path, port)) else None
            for host in (b"a.test", b"b.test", b"c")
            for path in (b"/", b"/x/y")
            for port in (80, 443)
        ],
    }


def _check_pools(table: RoutingTable) -> None:
    for app in table.apps():
        for bucket in app.buckets.values():
            assert bucket
            for target in bucket.targets():
                assert (target.app, target.region) == (app.name, bucket.region)
                if target.cordoned:
                    pool = bucket.out
                elif target.state is MachineState.STARTED:
                    pool = bucket.ready if target.healthy else bucket.reserve
                else:
                    pool = bucket.asleep if target.driver and target.state in ASLEEP else bucket.out
                assert target.pool is pool
                assert pool[target.position] is target
            assert bucket.uneven == sum(target.weight != WEIGHT_USUAL for target in bucket.targets())
            assert len(bucket) == len({target.id for target in bucket.targets()})


@given(st.lists(_changes(), max_size=60), st.randoms(use_true_random=False))
def test_is_the_same_whatever_the_order_of_rows(changes: list[Change], rng: random.Random) -> None:
    table = RoutingTable(own_node="n1")
    final: dict[tuple[str, Row], Change] = {}
    for change in [*_BASE, *changes]:
        table.apply(*change)
        final[change[:2]] = change
        _check_pools(table)
    shuffled = list(final.values())
    rng.shuffle(shuffled)
    fresh = RoutingTable(own_node="n1")
    for change in shuffled:
        fresh.apply(*change)
    assert _view(fresh) == _view(table)
    reloaded = RoutingTable(own_node="n1")
    for change in changes[: len(changes) // 2]:
        reloaded.apply(*change)
    reloaded.load(change for change in shuffled if change[2] is not None)
    assert _view(reloaded) == _view(table)


_WANTS = st.builds(
    Want,
    regions=st.lists(st.sampled_from((*REGIONS, "eu", "any")), max_size=2).map(tuple),
    instance=st.none() | st.sampled_from(MACHINES),
    prefer_instance=st.none() | st.sampled_from(MACHINES),
    exclude=st.frozensets(st.sampled_from(MACHINES), max_size=1),
)


@given(
    st.lists(_changes(), max_size=40),
    _WANTS,
    st.lists(st.sampled_from(MACHINES), max_size=2),
    st.integers(0, 99),
)
def test_a_choice_is_always_a_machine_of_the_app_that_may_take_it(
    changes: list[Change], want: Want, tried: list[str], seed: int
) -> None:
    table = RoutingTable(own_node="n1")
    balancer = Balancer(table, "ams", random.Random(seed))
    base = [row("apps", name=name) for name in APPS] + [row("services", app=name) for name in APPS]
    for change in [*base, *_BASE, *changes]:
        table.apply(*change)
        for name in APPS:
            service = table.service(name, 80)
            if service is None:
                continue
            target = balancer.choose(service, 0.0, want, tried)
            if isinstance(target, Refusal):
                assert target.code in {"PR01", "PR02", "PR03", "PR04"}
                continue
            assert target is table.machine(target.id)
            assert target.app == name
            assert target.state is MachineState.STARTED
            assert not target.cordoned
            assert target.id not in tried
            assert target.id not in want.exclude
            assert service.upstream_port(target) is not None
            assert service.hard_limit is None or target.load < service.hard_limit
            assert want.instance in (None, target.id)
            if want.regions:
                assert any(table.regions.covers(region, target.region) for region in want.regions)
