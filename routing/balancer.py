"""Which machine gets a request.

Decides among the machines of one service: nearest tier first, power of two choices on load inside a
tier, over the soft limit on to the next tier, never over the hard limit; and if checks and recent
failures leave nobody, or fewer than the service wants, the unhealthy too. Refuses to know requests,
connections and time: `now` comes from the caller. Invariant: a machine of another app is never returned,
nor one that is stopped, cordoned, excluded, already tried or at its hard limit.

The cost does not depend on the size of the table, and in the usual case not on the size of the app.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from .explain import Verdict, describe, judge
from .geo import AREAS
from .scaling import USUAL
from .stickiness import hash_key, score
from .target import COLD
from .types import WEIGHT_USUAL, GoalRow, MachineState

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from .table import RoutingTable, Service
    from .target import Bucket, Target

# How far to look through a tier when neither of two random machines will do; an overload must not make
# every choice cost the size of the app. Over the soft limit the price of a miss is a tier farther away:
# with 1 in 5 below it, 16 looks miss in 3 of 100 cases. Over the hard limit it is a wait in the queue:
# with 1 in 50 below it, 256 looks miss in 6 of 1,000, and tiers of up to 256 machines are never missed.
SOFT_SCAN_MAX: Final = 16
HARD_SCAN_MAX: Final = 256
# How much a request more at a machine lowers its chance against another one, over the load of both: found by
# `make bench-routing`. More has machines swing between idle and full, less evens out too slowly.
OWN_GAIN: Final = 10.0
TREND_GAIN: Final = 4.0
# How many machines a draw by weight is made among: enough for chances that are like the weights.
DRAWN_MAX: Final = 8
# A machine that has just come gets this share, or nobody would ever see that it works.
WARM_LEAST: Final = 0.1
# A refusal counts what this many machines fell to: enough to see why, and cheap while refusals rain.
FALLEN_COUNT_MAX: Final = 128
# Orders of regions kept per app. Clients can ask for any order, so there must be an end.
PLANS_MAX: Final = 64

_UNLIMITED: Final = math.inf
# As `now`, it makes every ejection look expired.
_IGNORE_EJECTION: Final = math.inf


class Rng(Protocol):
    """The one thing needed of a random number generator."""

    def random(self) -> float:
        """Return a number in [0, 1)."""


class Want(NamedTuple):
    """What a replay or a client asks of the choice.

    `regions` are codes and areas in order of preference; without a last `any` nothing else will do.
    `instance` is that machine or none. `prefer_instance` is that machine if it can take the request. Requests
    with the same `key` go to the same machine while it can take them.
    """

    regions: tuple[str, ...] = ()
    instance: str | None = None
    prefer_instance: str | None = None
    exclude: frozenset[str] = frozenset()
    key: bytes = b""


ANYWHERE: Final = Want()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Nobody could take the request: why, with how many of the nearest machines fell to which filter.

    `at_limit` says that only hard limits stood in the way, so that waiting may help.
    """

    code: str
    reason: str
    at_limit: bool = False
    asleep: Target | None = None  # what could take the request once it is started


# Codes of Fly's error list: nothing healthy, instance not found, nothing left after tries, at the limit.
NO_MACHINE: Final = "PR01"
INSTANCE_NOT_FOUND: Final = "PR02"
NO_CANDIDATE_LEFT: Final = "PR03"
AT_LIMIT: Final = "PR04"


class Balancer:
    """Chooses machines for one process in one region."""

    def __init__(self, table: RoutingTable, region: str, rng: Rng, *, panic: bool = True) -> None:
        self._table = table
        self._region = region
        self._random = rng.random
        self._panic = panic  # whether unhealthy and ejected machines are better than nobody

    def choose(
        self, service: Service, now: float, want: Want = ANYWHERE, tried: Collection[str] = ()
    ) -> Target | Refusal:
        """Return the machine to send a request to, or a Refusal.

        `now` is in seconds of the clock that health.record_failure is given. `tried` holds the ids of
        machines that failed this request before. The caller counts `Target.in_flight`.
        """
        if want.instance is not None:
            return self._choose_instance(service, want.instance, now, want, tried)
        plan = self._plan(service, want.regions)
        hard = _UNLIMITED if service.hard_limit is None else service.hard_limit
        if service.panic_percent and self._is_panicking(service, plan):
            return self._choose_in_panic(service, plan, now, hard, want, tried)
        if want is not ANYWHERE:
            wanted = self._find_wanted(service, plan, now, hard, want, tried)
            if wanted is not None:
                return wanted
        for bucket in plan:
            target = self._pick(service, bucket.ready, now, service.soft_limit, hard, want, tried)
            if target is not None:
                return target
        for bucket in plan:
            target = self._pick(service, bucket.ready, now, _UNLIMITED, hard, want, tried)
            if target is not None:
                return target
        return self._choose_in_need(service, plan, now, hard, want, tried)

    def _find_wanted(
        self,
        service: Service,
        plan: tuple[Bucket, ...],
        now: float,
        hard: float,
        want: Want,
        tried: Collection[str],
        *,
        sick_too: bool = False,
    ) -> Target | None:
        """Return the machine that is preferred or has the key, if it can take the request."""
        if want.prefer_instance is not None:
            preferred = self._table.machine(want.prefer_instance)
            if preferred is not None and preferred.bucket in plan:
                verdict = judge(service, preferred, now, want, tried)
                if verdict is Verdict.CANDIDATE or verdict is Verdict.OVER_SOFT:
                    return preferred
                if sick_too and verdict is Verdict.UNHEALTHY and preferred.ejected_until <= now:
                    return preferred
        if want.key:
            key = hash_key(want.key)
            for bucket in plan:
                best, highest = None, -1.0
                for pool in (bucket.ready, bucket.reserve) if sick_too else (bucket.ready,):
                    for target in pool:
                        its = score(key, target)
                        if its > highest and _fits(service, target, now, _UNLIMITED, hard, want, tried):
                            best, highest = target, its
                if best is not None:
                    return best
        return None

    def _is_panicking(self, service: Service, plan: tuple[Bucket, ...]) -> bool:
        """True when less than the wanted share of the started machines in reach is healthy."""
        if not self._panic:
            return False
        healthy = unhealthy = 0
        for bucket in plan:
            healthy += len(bucket.ready)
            unhealthy += len(bucket.reserve)
        return healthy * 100 < (healthy + unhealthy) * service.panic_percent

    def _choose_in_panic(
        self,
        service: Service,
        plan: tuple[Bucket, ...],
        now: float,
        hard: float,
        want: Want,
        tried: Collection[str],
    ) -> Target | Refusal:
        """Do what `choose` does, as if no check had failed.

        Healthy and unhealthy get requests by their numbers; within both the less loaded of two is taken.
        """
        if want is not ANYWHERE:
            wanted = self._find_wanted(service, plan, now, hard, want, tried, sick_too=True)
            if wanted is not None:
                return wanted
        for soft in (float(service.soft_limit), _UNLIMITED):
            for bucket in plan:
                one, other = bucket.ready, bucket.reserve
                if self._random() * (len(one) + len(other)) >= len(one):
                    one, other = other, one
                for pool in (one, other):
                    target = self._pick(service, pool, now, soft, hard, want, tried)
                    if target is not None:
                        return target
        return self._choose_in_need(service, plan, now, hard, want, tried)

    def describe_panic(self, service: Service, want: Want = ANYWHERE) -> str:
        """Return why health is ignored now, in words; empty where it counts."""
        plan = self._plan(service, want.regions)
        if not service.panic_percent or not self._is_panicking(service, plan):
            return ""
        healthy = sum([len(bucket.ready) for bucket in plan])
        total = healthy + sum([len(bucket.reserve) for bucket in plan])
        percent = service.panic_percent
        return f"{healthy} of {total} machines are healthy, less than {percent} %: checks are ignored"

    def _choose_in_need(
        self,
        service: Service,
        plan: tuple[Bucket, ...],
        now: float,
        hard: float,
        want: Want,
        tried: Collection[str],
    ) -> Target | Refusal:
        """Choose when nobody healthy has room: wait for the healthy, or turn to the others."""
        at_limit = any(
            self._pick(service, bucket.ready, now, _UNLIMITED, _UNLIMITED, want, tried) is not None
            for bucket in plan
        )
        if self._panic and not at_limit:
            for pool in (pool for bucket in plan for pool in (bucket.ready, bucket.reserve)):
                target = self._pick(service, pool, _IGNORE_EJECTION, _UNLIMITED, hard, want, tried)
                if target is not None:
                    return target
                full = self._pick(service, pool, _IGNORE_EJECTION, _UNLIMITED, _UNLIMITED, want, tried)
                at_limit = at_limit or full is not None
        return self._refuse(service, now, want, tried, at_limit=at_limit)

    def _pick(  # noqa: PLR0911 - it runs for each request, and leaves where it can
        self,
        service: Service,
        pool: list[Target],
        now: float,
        soft: float,
        hard: float,
        want: Want,
        tried: Collection[str],
    ) -> Target | None:
        """Return the less loaded of two random machines if it fits, else one of some others that does."""
        size = len(pool)
        if not size:
            return None
        first = int(self._random() * size)
        target = pool[first]
        if size > 1:
            if service.slow_start_s or (target.bucket is not None and target.bucket.uneven):
                return self._pick_by_weight(service, pool, now, soft, hard, want, tried)
            second = int(self._random() * (size - 1))
            other = pool[second if second < first else second + 1]
            if target.trend or other.trend:
                if self._prefers(other, target):
                    target, other = other, target
            elif other.in_flight < target.in_flight:
                target, other = other, target
            if _fits(service, target, now, soft, hard, want, tried):
                return target
            if _fits(service, other, now, soft, hard, want, tried):
                return other
        elif _fits(service, target, now, soft, hard, want, tried):
            return target
        scan_max = HARD_SCAN_MAX if soft == _UNLIMITED else SOFT_SCAN_MAX
        for step in range(1, min(size, scan_max)):
            target = pool[(first + step) % size]
            if _fits(service, target, now, soft, hard, want, tried):
                return target
        return None

    def _prefers(self, one: Target, other: Target) -> bool:
        """True, with some chance, when a machine that others use too is better than another one.

        The chance grows with the difference. What an edge has itself decides by a request or two. What others
        have had on average is a reason to send less there, never to send nothing: they think the same.
        """
        better = OWN_GAIN * (other.in_flight - one.in_flight) + TREND_GAIN * (other.trend - one.trend)
        total = one.in_flight + one.trend + other.in_flight + other.trend
        return self._random() * total < 0.5 * total + better

    def _pick_by_weight(
        self,
        service: Service,
        pool: list[Target],
        now: float,
        soft: float,
        hard: float,
        want: Want,
        tried: Collection[str],
    ) -> Target | None:
        """Do what `_pick` does where machines differ: chances, loads and the soft limit go by weight."""
        size = len(pool)
        first, second = self._draw(service, pool, now), self._draw(service, pool, now)
        if second.usual_load * first.weight < first.usual_load * second.weight:
            first, second = second, first
        for target in (first, second):
            if _fits(service, target, now, soft * target.weight / WEIGHT_USUAL, hard, want, tried):
                return target
        start = int(self._random() * size)
        for step in range(min(size, HARD_SCAN_MAX if soft == _UNLIMITED else SOFT_SCAN_MAX)):
            target = pool[(start + step) % size]
            if _fits(service, target, now, soft * target.weight / WEIGHT_USUAL, hard, want, tried):
                return target
        return None

    def _draw(self, service: Service, pool: list[Target], now: float) -> Target:
        """Return a machine at random, each with a chance as its weight; of large pools, of some of them."""
        size = len(pool)
        chosen, total = pool[0], 0.0
        for number in range(min(size, DRAWN_MAX)):
            target = pool[number] if size <= DRAWN_MAX else pool[int(self._random() * size)]
            weight = float(target.weight)
            if service.slow_start_s:
                if target.warm_since == COLD:
                    target.warm_since = now
                weight *= min(1.0, max(WARM_LEAST, (now - target.warm_since) / service.slow_start_s))
            total += weight
            if self._random() * total < weight:
                chosen = target
        return chosen

    def _choose_instance(
        self, service: Service, instance: str, now: float, want: Want, tried: Collection[str]
    ) -> Target | Refusal:
        """Return the one machine that will do, whatever its checks and recent failures say."""
        target = self._table.machine(instance)
        if target is None or target.app != service.app:
            return Refusal(INSTANCE_NOT_FOUND, f"app {service.app!r} has no machine {instance!r}")
        if target.bucket not in self._plan(service, want.regions):
            verdict = Verdict.OTHER_REGION
        else:
            verdict = judge(service, target, now, want, tried)
            if verdict not in _FORCED_MAY_NOT:
                return target
        return Refusal(
            NO_CANDIDATE_LEFT if verdict is Verdict.TRIED else NO_MACHINE,
            f"machine {instance!r}: {describe(verdict, service, target, now)}",
            at_limit=verdict is Verdict.AT_HARD_LIMIT,
            asleep=target if verdict is Verdict.NOT_STARTED and self._may_start(service, target) else None,
        )

    def _refuse(
        self, service: Service, now: float, want: Want, tried: Collection[str], *, at_limit: bool
    ) -> Refusal:
        where = f"of {service.app!r}" + (f" in {','.join(want.regions)}" if want.regions else "")
        if at_limit:
            return Refusal(AT_LIMIT, f"every machine {where} is at its hard limit", at_limit)
        fallen: dict[str, int] = {}
        for _, verdict in islice(self._judge_all(service, now, want, tried), FALLEN_COUNT_MAX):
            if verdict is not Verdict.OTHER_REGION:
                fallen[verdict.value] = fallen.get(verdict.value, 0) + 1
        why = ", ".join(f"{count} {filtered}" for filtered, count in fallen.items()) or "there is none"
        asleep = self._find_asleep(service, want)
        if tried:
            return Refusal(NO_CANDIDATE_LEFT, f"no other machine {where} to try: {why}", at_limit, asleep)
        return Refusal(NO_MACHINE, f"no machine {where} can take requests: {why}", at_limit, asleep)

    def _find_asleep(self, service: Service, want: Want) -> Target | None:
        """Return the machine to start for a request: one on its way, else the nearest one without fault.

        The same for all who ask at the same time, so that one request does not start several.
        """
        plan = self._plan(service, want.regions)
        asleep = (target for bucket in plan for target in islice(bucket.asleep, HARD_SCAN_MAX))
        able = [
            target for target in asleep if target.id not in want.exclude and self._may_start(service, target)
        ]
        tiers = {bucket.region: place for place, bucket in enumerate(plan)}
        return min(
            able,
            key=lambda target: (
                target.state is not MachineState.STARTING,
                bool(target.problem),
                tiers[target.region],
                target.id,
            ),
            default=None,
        )

    def _judge_all(
        self, service: Service, now: float, want: Want, tried: Collection[str]
    ) -> Iterator[tuple[Target, Verdict]]:
        plan = self._plan(service, want.regions)
        for bucket in plan:
            for target in bucket.targets():
                yield target, judge(service, target, now, want, tried)
        for bucket in service.owner.buckets.values():
            if bucket not in plan:
                for target in bucket.targets():
                    yield target, Verdict.OTHER_REGION

    def _may_start(self, service: Service, target: Target) -> bool:
        """True when the service has its machines started for requests, and something can start this one.

        One that drains to be stopped may go on; not one that somebody wants to drain. Only its owner starts
        it, who has to be there.
        """
        scaling = USUAL if service.options is None else service.options.scaling
        if not (scaling.autostart and target.driver) or target.cordoned:
            return False
        if not self._table.is_present(target.node):
            return False
        if target.state is MachineState.DRAINING:
            goal = self._table.rows("goals").get((target.id,))
            if not isinstance(goal, GoalRow) or goal.state is MachineState.DRAINING:
                return False
        return service.upstream_port(target) is not None

    def tiers(self, service: Service, want: Want = ANYWHERE) -> tuple[str, ...]:
        """Return the regions that are looked through for a request, in order."""
        return tuple(bucket.region for bucket in self._plan(service, want.regions))

    def explain(
        self, service: Service, now: float, want: Want = ANYWHERE, tried: Collection[str] = ()
    ) -> list[tuple[Target, str]]:
        """Return every machine of the service, nearest tier first, with what speaks for or against it."""
        explained = []
        panic = self.describe_panic(service, want)
        for target, verdict in self._judge_all(service, now, want, tried):
            if want.instance is not None and target.id != want.instance:
                verdict = Verdict.NOT_THE_INSTANCE  # noqa: PLW2901 - the stronger reason replaces the weaker one
            told = describe(verdict, service, target, now, self._table.ways)
            if panic and verdict is Verdict.UNHEALTHY:
                told = f"{told}; panic, {panic}"
            explained.append((target, told))
        return explained

    def _plan(self, service: Service, regions: tuple[str, ...]) -> tuple[Bucket, ...]:
        """Return the tiers to look through, in order; cached until regions of the app come or go."""
        app = service.owner
        if not regions and app.home_region == self._region:
            return app.home
        # A table may serve several balancers, so our region is part of the key.
        key = (self._region, regions)
        plan = app.plans.get(key)
        if plan is None:
            plan = self._compute_plan(app.buckets, regions or ("any",))
            if not regions and not app.home_region:
                app.home_region, app.home = self._region, plan
            elif 0 < len(app.plans) < PLANS_MAX:
                app.plans[key] = plan
            else:
                app.plans = {key: plan}
        return plan

    def _compute_plan(self, buckets: dict[str, Bucket], regions: tuple[str, ...]) -> tuple[Bucket, ...]:
        known = self._table.regions
        nearest_first = sorted(
            buckets.values(),
            key=lambda bucket: (known.rtt_ms(self._region, bucket.region), bucket.region),
        )
        plan: dict[str, Bucket] = {}
        for name in regions:
            if name in AREAS:
                for bucket in nearest_first:
                    if known.covers(name, bucket.region):
                        plan.setdefault(bucket.region, bucket)
            elif name in buckets:
                plan.setdefault(name, buckets[name])
        return tuple(plan.values())


# An instance that was asked for by name is tried even when its checks fail or it has just failed.
_FORCED_MAY_NOT: Final = frozenset(
    {
        Verdict.NOT_STARTED,
        Verdict.CORDONED,
        Verdict.NO_PORT,
        Verdict.EXCLUDED,
        Verdict.TRIED,
        Verdict.AT_HARD_LIMIT,
    }
)


def _fits(
    service: Service,
    target: Target,
    now: float,
    soft: float,
    hard: float,
    want: Want,
    tried: Collection[str],
) -> bool:
    return (
        target.in_flight + target.trend < soft
        and target.in_flight + target.remote_load < hard
        and target.ejected_until <= now
        and target.id not in tried
        and (want is ANYWHERE or target.id not in want.exclude)  # to hash a name is to look at it
        and (target.port is not None or service.internal_port is not None)
    )
