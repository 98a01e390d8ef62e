"""Deploys and scaling over real rows, with machines that are what the test writes into them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from isthmus.checking.probe import Outcome
from isthmus.config import AppConfig, MachineConfig
from isthmus.deploys.conductor import Conductor
from isthmus.deploys.course import Status
from isthmus.deploys.releases import Order, read_releases
from isthmus.deploys.spread import Spreader, plan_counts
from isthmus.machines.driver import DriverError, Machine, Made
from isthmus.registry import Registry, RegistryError
from replication.errors import StatementError
from tests.fakes.table import TableDatabase
from tests.isthmus.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

FAST = {"watch_s": 0.0, "drain_s": 0.0, "max_unavailable": 10.0}


class FakeProber:
    def __init__(self) -> None:
        self.outcome = Outcome(True, "connected")

    async def probe(self, definition: Any) -> Outcome:
        return self.outcome


class FakeDriver:
    """Makes machines until it is told not to."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.failure = ""
        self.answer: Made | None = None  # in place of a new machine

    async def create(self, like: Machine, region: str) -> Made:
        if self.failure:
            raise DriverError(self.failure)
        self.made.append(f"{region} like {like.id}")
        if self.answer is not None:
            return self.answer
        return Made(f"new-{len(self.made)}", f"10.9.0.{len(self.made)}:80")


class World:
    def __init__(self) -> None:
        self.database = TableDatabase()
        self.prober = FakeProber()
        self.driver = FakeDriver()
        self.present = {"n1", "n2"}
        self.now_ms = 1_000_000
        self.looks = 0
        self.known = True
        self.registry = Registry(self.database, "n1", "ams", (), drivers=("fake", "process"))
        self.conductor = self.make_conductor()
        self.spreader = Spreader(
            self.database.table,
            self.database,
            self.registry,
            {"fake": self.driver, "process": self.driver},
            node="n1",
            clock_ms=self.clock_ms,
        )

    def clock_ms(self) -> int:
        self.now_ms += 1
        return self.now_ms

    def is_known(self, _since_ms: int) -> bool:
        self.looks += 1
        return self.known

    async def look(self) -> None:
        """Wait until the machines were looked at some more times."""
        enough = self.looks + 5
        await eventually("some looks", lambda: self.looks >= enough)

    def make_conductor(self) -> Conductor:
        return Conductor(
            self.database.table,
            self.database,
            self.prober,
            self.is_known,
            lambda: self.present,
            node="n1",
            clock_ms=self.clock_ms,
        )

    async def add(self, *addresses: str, driver: str = "") -> None:
        machines = tuple(
            MachineConfig(address=f"{address}:80", id=f"m{i}", driver=driver)
            for i, address in enumerate(addresses, 1)
        )
        await self.registry.add_app(AppConfig(name="web", machines=machines))

    async def deploy(self, *addresses: str, **order: Any) -> int:
        machines = [{"address": f"{address}:80"} for address in addresses]
        told = msgspec.convert({"app": "web", "machines": machines, **FAST, **order}, Order)
        return (await self.conductor.begin(told, self.registry)).version

    async def end(self, version: int) -> tuple[str, str]:
        """Wait until a release is over; returns what became of it, and why."""

        async def over() -> dict[str, Any] | None:
            seen = await self.conductor.follow("web", version, 0)
            return seen if seen["finished_ms"] else None

        seen = await eventually(f"release {version} is over", over)
        await eventually("its task is", lambda: "web" not in self.conductor._running)
        return seen["status"], seen["problem"]

    async def run(self, version: int) -> tuple[str, str]:
        """Have the machines run a release, and wait until it is over."""
        self.database.connection.execute("UPDATE machines SET state = 'started', version = ?", (version,))
        self.database.put("apps", name="web")
        return await self.end(version)

    def serving(self) -> set[str]:
        sql = "SELECT address FROM machines WHERE cordoned = 0 AND state = 'started'"
        return {address.removesuffix(":80") for (address,) in self.database.rows(sql)}

    def goals(self) -> list[tuple[Any, ...]]:
        return self.database.rows("SELECT machine, state, version, release FROM goals ORDER BY machine")


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.deploys.conductor.TICK_S", 0.001)
    monkeypatch.setattr("isthmus.deploys.conductor.RETRY_S", 0.001)
    monkeypatch.setattr("isthmus.deploys.sight.TRY_S", 0.0)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.conductor.stop()
    world.database.close()


async def test_traffic_moves_in_one_transaction_and_the_old_ones_rest(world: World) -> None:
    await world.add("10.0.0.1", "10.0.0.2")
    seen = []
    world.database.on_commit = lambda _: seen.append(world.serving())
    version = await world.deploy("10.1.0.1", "10.1.0.2", strategy="bluegreen", release="v2", by="ana@desk")
    assert await world.end(version) == ("complete", "")
    steps = [serving for i, serving in enumerate(seen) if not i or serving != seen[i - 1]]
    assert steps == [{"10.0.0.1", "10.0.0.2"}, {"10.1.0.1", "10.1.0.2"}]
    old = world.database.rows("SELECT state, cordoned FROM machines WHERE id IN ('m1', 'm2')")
    assert old == [("stopped", 1)] * 2
    (release,) = await read_releases(world.database)
    assert (release.release, release.created_by, release.node) == ("v2", "ana@desk", "n1")
    assert release.status is Status.COMPLETE


async def test_new_ones_get_nothing_until_they_answer(world: World) -> None:
    await world.add("10.0.0.1")
    world.prober.outcome = Outcome(False, "Connection refused")
    version = await world.deploy("10.1.0.1", ready_s=0.05)
    status, problem = await world.end(version)
    assert status == "rolled back"
    assert problem.endswith(": Connection refused")
    assert world.serving() == {"10.0.0.1"}


async def test_checks_gate_where_there_are_some(world: World) -> None:
    await world.add("10.0.0.1")
    world.database.put("services", app="web", checks='[{"name": "up"}]')
    version = await world.deploy("10.1.0.1")
    sql = "SELECT id FROM machines WHERE address = '10.1.0.1:80'"
    ((machine,),) = world.database.rows(sql)
    await world.look()
    assert world.serving() == {"10.0.0.1"}
    world.database.put("checks", machine=machine, name="up", node="n1", status="critical", output="503")
    await world.look()
    assert world.serving() == {"10.0.0.1"}
    world.database.put("checks", machine=machine, name="up", node="n1", status="passing")
    assert await world.end(version) == ("complete", "")
    assert world.serving() == {"10.1.0.1"}


async def test_rollback_brings_the_machines_of_the_release_before_back(world: World) -> None:
    await world.add("10.0.0.1")
    for address in ("10.1.0.1", "10.2.0.1", "10.3.0.1"):
        assert (await world.end(await world.deploy(address, release=f"v{address[3]}")))[0] == "complete"
    rollback = Order(app="web", to=0, watch_s=0.0, drain_s=0.0)
    release = await world.conductor.begin(rollback, world.registry)
    assert release.release == "v2"
    assert await world.end(release.version) == ("complete", "")
    assert world.serving() == {"10.2.0.1"}
    with pytest.raises(RegistryError, match="release 1 had machines that are gone"):
        await world.conductor.begin(Order(app="web", to=1), world.registry)
    with pytest.raises(RegistryError, match="no complete release 99"):
        await world.conductor.begin(Order(app="web", to=99), world.registry)


@pytest.mark.parametrize("kept", [{"m1"}, {"m1", "m2", "m3"}])
async def test_rollback_restarts_all_machines_that_serve_however_many_they_were(
    world: World, kept: set[str]
) -> None:
    await world.add("10.0.0.1", "10.0.0.2", "10.0.0.3", driver="fake")
    world.database.connection.execute("UPDATE machines SET cordoned = 1 WHERE id = 'm3'")
    world.database.put("apps", name="web")
    for release in ("v1", "v2"):
        assert await world.run(await world.deploy(release=release)) == ("complete", "")
    marks = ", ".join(f"'{machine}'" for machine in kept)
    world.database.connection.execute(f"UPDATE machines SET cordoned = id NOT IN ({marks})")
    world.database.put("apps", name="web")
    assert await world.run(await world.deploy(to=0)) == ("complete", "")
    assert {goal[0] for goal in world.goals() if goal[2:] == (3, "v1")} == kept


async def test_machines_that_came_with_an_older_release_are_removed_and_no_others(world: World) -> None:
    await world.add("10.0.0.1")
    for address in ("10.1.0.1", "10.2.0.1", "10.3.0.1"):
        await world.end(await world.deploy(address))
    left = {row[0] for row in world.database.rows("SELECT address FROM machines")}
    assert left == {"10.0.0.1:80", "10.2.0.1:80", "10.3.0.1:80"}


async def test_machines_with_a_driver_get_the_release_as_their_goal(world: World) -> None:
    await world.add("10.0.0.1", driver="fake")
    world.database.connection.execute("UPDATE machines SET state = 'started'")
    world.database.put("apps", name="web")
    version = await world.deploy(release="v2")
    await eventually("its goal", lambda: world.goals() == [("m1", "started", 1, "v2")])
    await world.look()
    assert (await world.conductor.follow("web", 0, 0))["stage"] == "ready"
    world.database.connection.execute("UPDATE machines SET version = 1")
    world.database.put("apps", name="web")
    assert await world.end(version) == ("complete", "")


async def test_machines_of_a_node_that_is_gone_are_not_waited_for(world: World) -> None:
    await world.add("10.0.0.1", "10.0.0.2", driver="fake")
    world.database.connection.execute("UPDATE machines SET node = 'n9' WHERE id = 'm2'")
    world.database.put("apps", name="web")
    with pytest.raises(RegistryError, match="node n9 is gone, and nobody else starts m2: start it again, or"):
        await world.deploy(release="v1")
    world.present.add("n9")
    version = await world.deploy(release="v1", ready_s=0.0)
    world.present.remove("n9")
    assert "m2: its node n9 is gone" in (await world.end(version))[1]


async def test_failure_gives_the_release_before_back_as_the_goal(world: World) -> None:
    await test_machines_with_a_driver_get_the_release_as_their_goal(world)
    version = await world.deploy(release="v3")
    await eventually("its goal", lambda: world.goals() == [("m1", "started", 2, "v3")])
    world.database.connection.execute(
        "UPDATE machines SET version = 2, state = 'stopped', problem = 'exited with 1', since_ms = 5"
    )
    world.database.put("apps", name="web")
    await eventually("the goal before", lambda: world.goals() == [("m1", "started", 1, "v2")])
    world.database.connection.execute("UPDATE machines SET version = 1, state = 'started', problem = ''")
    world.database.put("apps", name="web")
    assert await world.end(version) == ("rolled back", "m1: exited with 1")


async def test_next_agent_goes_on_where_the_last_one_was(world: World) -> None:
    await world.add("10.0.0.1")
    world.prober.outcome = Outcome(False, "Connection refused")
    version = await world.deploy("10.1.0.1", by="ana")
    await world.look()
    told_before = (await world.conductor.follow("web", version, 0))["lines"]
    await world.conductor.stop()
    world.conductor = world.make_conductor()
    world.prober.outcome = Outcome(True, "connected")
    await world.conductor.start()
    assert await world.end(version) == ("complete", "")
    assert world.serving() == {"10.1.0.1"}
    # Who has followed the last agent up to its end misses nothing of the next one.
    told = (await world.conductor.follow("web", version, told_before[-1]["number"]))["lines"]
    assert told[0]["text"] == "the agent has started again; going on"


async def test_cancelled_deploy_goes_back_and_says_who_wanted_it(world: World) -> None:
    await world.add("10.0.0.1")
    world.prober.outcome = Outcome(False, "Connection refused")
    version = await world.deploy("10.1.0.1")
    await world.conductor.cancel("web", "ana")
    assert await world.end(version) == ("rolled back", "cancelled by ana")
    with pytest.raises(RegistryError, match="no deploy of `web` is running"):
        await world.conductor.cancel("web", "ana")


async def test_deploy_that_is_told_to_be_over_is_conducted_no_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.deploys.conductor.TICK_S", 0.05)
    await world.add("10.0.0.1")
    version = await world.deploy("10.1.0.1")

    async def is_over() -> bool:
        return bool((await world.conductor.follow("web", version, 0))["finished_ms"])

    await eventually("it is over", is_over)
    with pytest.raises(RegistryError, match="no deploy of `web` is running"):
        await world.conductor.cancel("web", "ana")


async def test_deploy_that_has_lost_its_app_to_another_does_not_take_that_along(world: World) -> None:
    await world.add("10.0.0.1")
    world.prober.outcome = Outcome(False, "Connection refused")
    await world.deploy("10.1.0.1")
    first = world.conductor._running["web"].task
    world.database.connection.execute("UPDATE releases SET node = 'n3'")
    version = await world.deploy("10.2.0.1")
    await eventually("the first has let go", lambda: first is None or first.done())
    await world.conductor.cancel("web", "ana")
    assert await world.end(version) == ("rolled back", "cancelled by ana")


async def test_one_deploy_of_an_app_at_a_time_until_its_node_is_gone(world: World) -> None:
    await world.add("10.0.0.1")
    world.prober.outcome = Outcome(False, "Connection refused")
    await world.deploy("10.1.0.1")
    with pytest.raises(RegistryError, match="release 1 of `web` is running on node `n1`"):
        await world.deploy("10.2.0.1")
    world.database.connection.execute("UPDATE releases SET node = 'n3'")
    world.prober.outcome = Outcome(True, "connected")
    await eventually("it has let go", lambda: "web" not in world.conductor._running)
    with pytest.raises(RegistryError, match="`n3` conducts the deploy of `web`: it is gone, and another"):
        await world.conductor.cancel("web", "ana")
    version = await world.deploy("10.2.0.1")
    assert await world.end(version) == ("complete", "")
    assert [release.status for release in await read_releases(world.database)] == [
        Status.COMPLETE,
        Status.ABANDONED,
    ]


async def test_deploy_that_another_node_begins_at_the_same_moment_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.add("10.0.0.1")
    theirs = {"app": "web", "version": 1, "node": "n2", "status": "running", "machines": "[]", "course": "{}"}

    async def execute(_statements: Any) -> None:
        world.database.put("releases", **theirs)
        raise StatementError(1, "UNIQUE constraint failed: releases.app, releases.version")

    monkeypatch.setattr(world.database, "execute", execute)
    with pytest.raises(RegistryError, match="release 1 of `web` is running on node `n2`"):
        await world.deploy("10.1.0.1")


async def test_of_two_that_were_begun_at_the_same_moment_one_changes_nothing(world: World) -> None:
    await world.add("10.0.0.1", driver="fake")
    goals = world.goals()
    world.known = False
    await world.deploy(release="v1")
    await world.look()
    assert world.goals() == goals
    world.database.connection.execute("UPDATE releases SET node = 'n2', release = 'v2'")  # theirs stands
    world.known = True
    await eventually("it has let go", lambda: "web" not in world.conductor._running)
    assert world.goals() == goals


async def test_write_that_fails_is_tried_again(world: World) -> None:
    await world.add("10.0.0.1")
    version = await world.deploy("10.1.0.1")
    world.database.failures = [OSError("disk full"), OSError("disk full")]
    await eventually("it has met both", lambda: not world.database.failures)
    assert await world.end(version) == ("complete", "")


@pytest.mark.parametrize(
    ("driver", "order", "problem"),
    [
        ("", {}, "m1, m2: no driver, so nothing here can start it"),
        ("fake", {}, "which release?"),
        (
            "fake",
            {"release": "v2", "strategy": "bluegreen"},
            "needs 2 cordoned machines with a driver in ams",
        ),
        ("process", {"release": "apps/v2"}, "`apps/v2` is no release for processes of a node"),
        ("", {"app": "nobody"}, "there is no app `nobody`"),
        ("", {"to": 0}, "no earlier release"),
        ("", {"machines": [{"address": "127.0.0.1:80", "command": ["sh"]}]}, "a command is only taken"),
        (
            "",
            {"machines": [{"address": "10.0.0.1:80", "id": "m1"}, {"address": "10.0.0.2:80", "id": "m2"}]},
            "serve",
        ),
    ],
)
async def test_order_that_cannot_be_carried_out_is_refused_and_changes_nothing(
    world: World, driver: str, order: dict[str, Any], problem: str
) -> None:
    await world.add("10.0.0.1", "10.0.0.2", driver=driver)
    before = len(world.database.transactions)
    with pytest.raises(RegistryError, match=problem):
        await world.deploy(**{"machines": [], **order})
    assert len(world.database.transactions) == before


@pytest.mark.parametrize(
    "order", [{"release": "../x"}, {"by": "a\nb"}, {"strategy": "hope"}, {"watch_s": -1}]
)
def test_order_that_makes_no_sense_is_none(order: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"app": "web", **order}, Order)


async def test_release_that_somebody_wrote_badly_is_passed_over(world: World) -> None:
    world.database.put("releases", app="web", version=1, status="nonsense")
    world.database.put("releases", app="web", version=2, status="complete", course="[")
    assert await read_releases(world.database) == []


# Scaling


@pytest.mark.parametrize(
    ("count", "regions", "expected"),
    [
        (3, ["ams", "gru"], {"ams": 2, "gru": 1}),
        (2, ["ams", "gru", "syd"], {"ams": 1, "gru": 1, "syd": 0}),
        (0, ["ams"], {"ams": 0}),
        (4, ["ams", "ams"], {"ams": 4}),
    ],
)
def test_machines_are_spread_evenly_the_first_region_first(
    count: int, regions: list[str], expected: dict[str, int]
) -> None:
    assert plan_counts(count, regions) == expected


async def scale(world: World, count: int, *regions: str, dry_run: bool = False) -> list[str]:
    answer = await world.spreader.scale("web", count, regions, dry_run=dry_run)
    return [f"{c['region']} {c['done']} {c['machine']}".strip() for c in answer["changes"]] + answer["advice"]


async def test_missing_machines_are_made_by_the_driver_with_the_current_release(world: World) -> None:
    await world.add("10.0.0.1", driver="fake")
    world.database.put("releases", app="web", version=7, release="v7", status="complete")
    assert await scale(world, 3, "ams", "gru", dry_run=True) == [
        "ams create with fake",
        "gru create with fake",
    ]
    assert world.driver.made == []
    assert await scale(world, 3, "ams", "gru") == ["ams create new-1", "gru create new-2"]
    assert world.driver.made == ["ams like m1", "gru like m1"]
    assert world.goals()[1:] == [("new-1", "started", 7, "v7"), ("new-2", "started", 7, "v7")]
    assert world.database.rows("SELECT region, driver FROM machines WHERE id = 'new-2'") == [("gru", "fake")]
    assert await scale(world, 3, "ams", "gru") == []


async def test_those_that_are_too_many_are_stopped_and_come_back_first(world: World) -> None:
    await world.add("10.0.0.1", "10.0.0.2", driver="fake")
    assert await scale(world, 1) == ["ams stop m2"]
    assert world.goals()[1][:2] == ("m2", "stopped")
    assert await scale(world, 2) == ["ams start m2"]
    assert world.goals()[1][:2] == ("m2", "started")
    assert world.driver.made == []


async def test_one_that_fails_its_checks_is_stopped_first(world: World) -> None:
    await world.add("10.0.0.1", "10.0.0.2", driver="fake")
    world.database.put("services", app="web", checks='[{"name": "up"}]')
    world.database.put("checks", machine="m1", name="up", node="n1", status="critical")
    assert await scale(world, 1) == ["ams stop m1"]


async def test_nothing_is_made_in_a_region_that_nobody_knows(world: World) -> None:
    await world.add("10.0.0.1", driver="fake")
    with pytest.raises(RegistryError, match="unknown region `amm`"):
        await scale(world, 2, "ams", "amm")
    assert world.driver.made == []


async def test_processes_are_not_made_and_the_dry_run_says_so(world: World) -> None:
    await world.add("10.0.0.1", driver="process")
    world.driver.failure = "processes are declared"
    assert await scale(world, 2, dry_run=True) == ["ams has 1 of 2 machines: processes are declared"]


async def test_what_only_a_person_can_do_is_said(world: World) -> None:
    await world.add("10.0.0.1")
    (advice,) = await scale(world, 2, "ams", "gru")
    assert advice.startswith("gru has 0 of 1 machines: no machine of it has a driver of node n1")
    world.database.connection.execute("UPDATE machines SET driver = 'fake'")
    world.database.put("apps", name="web")
    world.driver.failure = "no capacity"
    assert await scale(world, 2, "ams", "gru") == ["gru has 0 of 1 machines: no capacity"]


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (Made("m1", "10.0.0.1:80"), "fake says that it has made m1, which is there already"),
        (Made("m/2", "10.0.0.2:80"), "fake has made m/2, which cannot be added: `m/2` is no name"),
        (Made("m2", "nowhere at all"), "fake has made m2, which cannot be added: 'nowhere at all' is not"),
        (Made("m2", "10.0.0.2"), "fake has made m2, which cannot be added: `10.0.0.2` names no port"),
    ],
)
async def test_machine_that_cannot_be_one_is_told_of_and_not_added(
    world: World, made: Made, told: str
) -> None:
    await world.add("10.0.0.1", driver="fake")
    world.driver.answer = made
    (advice,) = await scale(world, 3)
    assert advice.startswith(f"ams has 1 of 3 machines: {told}")
    assert len(world.driver.made) == 1
    assert world.database.rows("SELECT id FROM machines") == [("m1",)]


async def test_driver_that_makes_the_same_machine_again_and_again_is_told_of(world: World) -> None:
    await world.add("10.0.0.1", driver="fake")
    world.driver.answer = Made("m2", "10.0.0.2:80")
    created, advice = await scale(world, 3)
    assert created == "ams create m2"
    assert advice.endswith("fake says that it has made m2, which is there already")


async def test_app_that_is_not_there_or_is_being_deployed_is_not_scaled(world: World) -> None:
    with pytest.raises(RegistryError, match="there is no app"):
        await scale(world, 2)
    await world.add("10.0.0.1")
    world.database.put("releases", app="web", version=1, status="running", node="n2")
    with pytest.raises(RegistryError, match="release 1 of `web` is running"):
        await scale(world, 2)
