from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec
import pytest

from isthmus.config import (
    AppConfig,
    CheckConfig,
    CompressionConfig,
    Config,
    GossipConfig,
    MachineConfig,
    PeeringConfig,
    RegionConfig,
    ReplayCacheConfig,
    ServiceConfig,
)
from isthmus.registry import NewMachine, Registry, RegistryError
from routing.compression import LEVELS
from routing.options import parse_options
from routing.stickiness import Sticky
from routing.table import RoutingTable
from tests.fakes.database import FakeDatabase

if TYPE_CHECKING:
    from collections.abc import Iterator

OWN = ("127.0.0.1:8080", "0.0.0.0:8471", "[::1]:8472")


@pytest.fixture
def database() -> Iterator[FakeDatabase]:
    database = FakeDatabase()
    yield database
    database.close()


@pytest.fixture
def registry(database: FakeDatabase) -> Registry:
    return Registry(database, "n1", "ams", OWN, drivers=("fly",))


def app(
    name: str = "web", *addresses: str, hosts: tuple[str, ...] = ("web.test",), path_prefix: str = "/"
) -> AppConfig:
    machines = tuple(MachineConfig(address=address) for address in addresses)
    return AppConfig(name=name, hosts=hosts, path_prefix=path_prefix, machines=machines)


def config(*apps: AppConfig, **regions: RegionConfig) -> Config:
    return Config(node="n1", data="/nowhere", region="ams", apps=apps, regions=regions)


def names(database: FakeDatabase, table: str, column: str) -> set[str]:
    return {row[0] for row in database.rows(f"SELECT {column} FROM {table}")}


def assert_routing_takes_all(database: FakeDatabase) -> None:
    table = RoutingTable("n1")
    for name, keys in (
        ("nodes", 1),
        ("regions", 1),
        ("apps", 1),
        ("hostnames", 2),
        ("services", 2),
        ("machines", 1),
    ):
        for row in database.rows(f"SELECT * FROM {name}"):
            table.apply(name, row[:keys], row)
    assert table.rejected == {}


class TestAddApp:
    async def test_app_with_all_that_belongs_to_it_is_one_transaction(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        web = AppConfig(
            name="web",
            hosts=("Web.Test", "*.web.test"),
            path_prefix="/api/",
            soft_limit=5,
            hard_limit=9,
            machines=(
                MachineConfig(address="10.0.0.1:80", id="m1", region="gru"),
                MachineConfig(address="10.0.0.2:80"),
            ),
            checks=(CheckConfig(path="/up"),),
        )
        ids = await registry.add_app(web)
        assert ids[0] == "m1"
        assert len(database.transactions) == 1
        assert database.rows("SELECT hostname, path_prefix, app FROM hostnames ORDER BY 1") == [
            ("*.web.test", "/api", "web"),
            ("web.test", "/api", "web"),
        ]
        assert database.rows("SELECT app, port, soft_limit, hard_limit FROM services") == [("web", 0, 5, 9)]
        (checks,) = database.rows("SELECT checks FROM services")[0]
        assert json.loads(checks)[0]["path"] == "/up"
        assert database.rows("SELECT id, node, region, address FROM machines ORDER BY address") == [
            ("m1", "n1", "gru", "10.0.0.1:80"),
            (ids[1], "n1", "ams", "10.0.0.2:80"),
        ]
        assert_routing_takes_all(database)

    async def test_same_twice_changes_nothing(self, database: FakeDatabase, registry: Registry) -> None:
        first = await registry.add_app(app("web", "10.0.0.1:80"))
        before = list(database.connection.iterdump())
        assert await registry.add_app(app("web", "10.0.0.1:80")) == first
        assert list(database.connection.iterdump()) == before

    async def test_limits_and_checks_become_what_is_given(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        await registry.add_app(app())
        await registry.add_app(
            AppConfig(name="web", hosts=("web.test",), soft_limit=3, checks=(CheckConfig(type="tcp"),))
        )
        ((soft, checks),) = database.rows("SELECT soft_limit, checks FROM services")
        assert soft == 3
        assert json.loads(checks)[0]["type"] == "tcp"

    async def test_route_of_another_app_is_refused(self, database: FakeDatabase, registry: Registry) -> None:
        await registry.add_app(app("web"))
        with pytest.raises(RegistryError, match=r"host `WEB.test` at / already leads to app `web`") as caught:
            await registry.add_app(app("other", hosts=("free.test", "WEB.test")))
        assert caught.value.found
        assert names(database, "apps", "name") == {"web"}

    async def test_same_host_below_another_path_is_free(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        await registry.add_app(app("web"))
        await registry.add_app(app("api", path_prefix="/api"))
        assert names(database, "apps", "name") == {"web", "api"}

    @pytest.mark.parametrize(
        ("machine", "problem"),
        [
            (MachineConfig(address="10.0.0.1:80", region="amz"), "unknown region `amz`; did you mean `ams`"),
            (MachineConfig(address="10.0.0.1:80", id="m1"), "machine `m1` already belongs to app `web`"),
            (MachineConfig(address="127.0.0.1:8080"), "127.0.0.1:8080 is a listener of this node itself"),
        ],
    )
    async def test_app_with_a_machine_that_cannot_be_is_refused_as_a_whole(
        self, database: FakeDatabase, registry: Registry, machine: MachineConfig, problem: str
    ) -> None:
        await registry.add_app(
            AppConfig(name="web", machines=(MachineConfig(address="10.0.0.9:80", id="m1"),))
        )
        with pytest.raises(RegistryError, match=problem):
            await registry.add_app(AppConfig(name="other", hosts=("o.test",), machines=(machine,)))
        assert names(database, "apps", "name") == {"web"}

    async def test_machine_may_do_without_a_port_where_the_app_names_one(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        await registry.add_app(AppConfig(name="db", hosts=(), internal_port=5432))
        await registry.add_machine(NewMachine(app="db", address="10.0.0.1"))
        assert database.rows("SELECT address FROM machines") == [("10.0.0.1",)]
        await registry.add_app(AppConfig(name="web"))
        with pytest.raises(RegistryError, match=r"`10.0.0.2` names no port"):
            await registry.add_machine(NewMachine(app="web", address="10.0.0.2"))


class TestRemoveApp:
    async def test_all_that_belongs_to_the_app_goes_and_nothing_else(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        ids = await registry.add_app(app("web", "10.0.0.1:80"))
        other = await registry.add_app(app("other", "10.0.0.2:80", hosts=("o.test",)))
        for machine in (*ids, *other):
            database.put("checks", machine=machine, name="c", node="n1", status="passing")
            database.put("loads", machine=machine, node="n1")
        await registry.remove_app("web")
        for table, column in (
            ("apps", "name"), ("services", "app"), ("hostnames", "app"), ("machines", "app"),
        ):  # fmt: skip
            assert names(database, table, column) == {"other"}
        assert names(database, "checks", "machine") == names(database, "loads", "machine") == set(other)

    async def test_absent_app_is_not_found(self, registry: Registry) -> None:
        with pytest.raises(RegistryError, match="there is no app `web`") as caught:
            await registry.remove_app("web")
        assert not caught.value.found


class TestMachines:
    async def test_machine_is_owned_by_this_node_and_in_its_region(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        await registry.add_app(app())
        machine = await registry.add_machine(NewMachine(app="web", address="[fdaa::3]:80"))
        assert database.rows("SELECT id, app, node, region, state FROM machines") == [
            (machine, "web", "n1", "ams", "started")
        ]
        assert await registry.add_machine(NewMachine(app="web", address="[fdaa::3]:80")) == machine
        assert len(database.rows("SELECT * FROM machines")) == 1
        assert_routing_takes_all(database)

    async def test_ids_made_up_differ_by_node_app_and_address(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        await registry.add_app(app())
        await registry.add_app(app("two", hosts=("two.test",)))
        other_node = Registry(database, "n2", "ams", ())
        made = {
            await adder.add_machine(NewMachine(app=name, address=address))
            for adder in (registry, other_node)
            for name in ("web", "two")
            for address in ("10.0.0.1:80", "10.0.0.2:80")
        }
        assert len(made) == 8

    async def test_region_of_the_operators_own_is_taken(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        await registry.add_app(app())
        with pytest.raises(RegistryError, match="unknown region `lab`"):
            await registry.add_machine(NewMachine(app="web", address="10.0.0.1:80", region="lab"))
        database.put("regions", code="lab", latitude=0, longitude=0)
        await registry.add_machine(NewMachine(app="web", address="10.0.0.1:80", region="lab"))
        assert names(database, "machines", "region") == {"lab"}

    @pytest.mark.parametrize(
        ("new", "problem", "found"),
        [
            (NewMachine(app="none", address="10.0.0.1:80"), "there is no app `none`", False),
            (NewMachine(app="web", address="nowhere"), "`nowhere` names no port", True),
            (NewMachine(app="web", address="10.0.0.1:0"), "1 to 65535", True),
            (NewMachine(app="web", address="10.0.0.1:80", id="a b"), "`a b` is no name for a machine", True),
            (
                NewMachine(app="web", address="10.0.0.1:80", id="taken"),
                "`taken` already belongs to app `two`",
                True,
            ),
            (NewMachine(app="web", address="10.0.0.1:80", region="grv"), "did you mean `gru`", True),
        ],
    )
    async def test_machine_that_cannot_be_is_refused(
        self, database: FakeDatabase, registry: Registry, new: NewMachine, problem: str, *, found: bool
    ) -> None:
        await registry.add_app(app())
        await registry.add_app(app("two", hosts=("two.test",)))
        await registry.add_machine(NewMachine(app="two", address="10.0.0.2:80", id="taken"))
        with pytest.raises(RegistryError, match=problem) as caught:
            await registry.add_machine(new)
        assert caught.value.found is found
        assert names(database, "machines", "id") == {"taken"}

    @pytest.mark.parametrize(
        "address",
        [
            "127.0.0.1:8080", "localhost:8080", "127.1.2.3:8080", "0.0.0.0:8080",  # the proxy
            "127.0.0.1:8471", "[::1]:8471", "localhost:8471",  # the admin listener, on all addresses
            "[::1]:8472", "localhost:8472",  # gossip
        ],
    )  # fmt: skip
    async def test_listener_of_the_node_itself_is_no_machine(self, registry: Registry, address: str) -> None:
        await registry.add_app(app())
        with pytest.raises(RegistryError, match="is a listener of this node itself, not a machine"):
            await registry.add_machine(NewMachine(app="web", address=address))

    @pytest.mark.parametrize("address", ["127.0.0.1:8081", "10.0.0.1:8080", "web.internal:8471"])
    async def test_neighbours_of_the_listeners_may_be_machines(
        self, registry: Registry, address: str
    ) -> None:
        await registry.add_app(app())
        assert await registry.add_machine(NewMachine(app="web", address=address))

    @pytest.mark.parametrize(
        ("action", "state", "cordoned"),
        [
            ("stop", "stopped", 0),
            ("cordon", "started", 1),
            ("start", "started", 0),
            ("uncordon", "started", 0),
        ],
    )
    async def test_actions_change_state_and_cordon(
        self, database: FakeDatabase, registry: Registry, action: str, state: str, cordoned: int
    ) -> None:
        (machine,) = await registry.add_app(app("web", "10.0.0.1:80"))
        await registry.change_machine(machine, action)
        assert database.rows("SELECT state, cordoned FROM machines") == [(state, cordoned)]

    @pytest.mark.parametrize("undo", [("stop", "start"), ("cordon", "uncordon")])
    async def test_actions_are_undone_by_their_opposites(
        self, database: FakeDatabase, registry: Registry, undo: tuple[str, str]
    ) -> None:
        (machine,) = await registry.add_app(app("web", "10.0.0.1:80"))
        before = database.rows("SELECT state, cordoned FROM machines")
        for action in undo:
            await registry.change_machine(machine, action)
        assert database.rows("SELECT state, cordoned FROM machines") == before

    async def test_state_says_since_when(self, database: FakeDatabase, registry: Registry) -> None:
        (machine,) = await registry.add_app(app("web", "10.0.0.1:80"))
        await registry.change_machine(machine, "drain")
        ((state, since_ms),) = database.rows("SELECT state, since_ms FROM machines")
        assert (state, since_ms > 1_500_000_000_000) == ("draining", True)
        database.put("machines", id=machine, app="web", node="n1", region="ams", address="a:1", since_ms=5)
        await registry.change_machine(machine, "start")
        assert database.rows("SELECT since_ms FROM machines") == [(5,)]  # it was started already

    async def test_nothing_suspends_a_machine_without_a_driver(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        (machine,) = await registry.add_app(app("web", "10.0.0.1:80"))
        with pytest.raises(RegistryError, match="no driver"):
            await registry.change_machine(machine, "suspend")
        assert database.rows("SELECT state FROM machines") == [("started",)]

    async def test_action_on_a_machine_with_a_driver_is_its_owners_to_do(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        await registry.add_app(app("web"))
        await registry.add_machine(NewMachine(app="web", address="10.0.0.1:80", id="m1", driver="fly"))
        assert database.rows("SELECT state, driver FROM machines") == [("stopped", "fly")]
        assert database.rows("SELECT machine, state, reason FROM goals") == [("m1", "started", "declared")]
        await registry.change_machine("m1", "suspend")
        assert database.rows("SELECT state FROM machines") == [("stopped",)]
        goals = database.rows("SELECT machine, state, asked_by, reason, asked_ms > 0 FROM goals")
        assert goals == [("m1", "suspended", "n1", "command", 1)]
        await registry.add_machine(NewMachine(app="web", address="10.0.0.1:80", id="m1", driver="fly"))
        assert database.rows("SELECT state FROM goals") == [("suspended",)]
        await registry.remove_machine("m1")
        assert database.rows("SELECT * FROM goals") == []

    async def test_commands_and_unknown_drivers_are_refused(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        command = MachineConfig(address="10.0.0.1:80", command=("true",))
        with pytest.raises(RegistryError, match="only taken from the configuration file"):
            await registry.add_app(AppConfig(name="web", machines=(command,)))
        await registry.add_app(app("web"))
        with pytest.raises(RegistryError, match="no driver `k8s`"):
            await registry.add_machine(NewMachine(app="web", address="10.0.0.1:80", driver="k8s"))
        assert database.rows("SELECT * FROM machines") == []

    @pytest.mark.parametrize(("autostop", "goal"), [("off", "started"), ("stop", "stopped")])
    async def test_declared_commands_run_unless_requests_are_to_start_them(
        self, database: FakeDatabase, registry: Registry, autostop: str, goal: str
    ) -> None:
        machine = MachineConfig(address="10.0.0.1:80", id="m1", command=("true",))
        declared = AppConfig(name="web", machines=(machine,), autostop=autostop)
        config = Config(node="n1", data="/x", apps=(declared,))
        await registry.announce(config, "a:1", 5)
        assert database.rows("SELECT state, driver FROM machines") == [("stopped", "process")]
        assert database.rows("SELECT machine, state FROM goals") == [("m1", goal)]
        database.put(
            "machines",
            id="m1",
            app="web",
            node="n1",
            region="ams",
            address="a:1",
            state="started",
            managed_by="config:n1",
        )
        await registry.announce(config, "a:1", 6)
        assert database.rows("SELECT state FROM machines") == [("started",)]  # as its owner has written it
        await registry.announce(Config(node="n1", data="/x"), "a:1", 7)
        assert database.rows("SELECT * FROM goals") == []

    async def test_removed_machine_takes_its_checks_and_loads_along(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        (machine,) = await registry.add_app(app("web", "10.0.0.1:80"))
        database.put("checks", machine=machine, name="c", node="n1", status="passing")
        database.put("loads", machine=machine, node="n1")
        await registry.remove_machine(machine)
        for table in ("machines", "checks", "loads"):
            assert database.rows(f"SELECT * FROM {table}") == []

    async def test_absent_machine_is_not_found(self, registry: Registry) -> None:
        with pytest.raises(RegistryError, match="there is no machine `m9`") as removed:
            await registry.remove_machine("m9")
        with pytest.raises(RegistryError, match="there is no machine `m9`") as changed:
            await registry.change_machine("m9", "stop")
        assert not removed.value.found
        assert not changed.value.found


class TestAnnounce:
    async def test_node_regions_and_declared_apps_are_written_in_one_transaction(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        declared = config(app("web", "10.0.0.1:80"), lab=RegionConfig(latitude=1, longitude=2, name="Lab"))
        await registry.announce(declared, "127.0.0.1:8080", 1000)
        assert len(database.transactions) == 1
        ((node, region, address, started_ms, software, peering),) = database.rows("SELECT * FROM nodes")
        assert peering == "{}"
        assert (node, region, address, started_ms) == ("n1", "ams", "127.0.0.1:8080", 1000)
        assert software.startswith("isthmus ")
        assert database.rows("SELECT * FROM regions") == [("lab", "Lab", 1.0, 2.0)]
        for table in ("apps", "hostnames", "services", "machines"):
            assert names(database, table, "managed_by") == {"config:n1"}
        assert_routing_takes_all(database)

    async def test_others_are_told_how_machines_of_this_node_are_reached(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        peering = PeeringConfig(listen="0.0.0.0:9", advertise="192.0.2.1:9", networks=("10.0.0.0/8",))
        declared = msgspec.structs.replace(
            config(app("web", "10.0.0.1:80")),
            gossip=GossipConfig(keys=("MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=",)),
            peering=peering,
        )
        await registry.announce(declared, "127.0.0.1:8080", 1000)
        ((said,),) = database.rows("SELECT peering FROM nodes")
        assert json.loads(said) == {"address": "192.0.2.1:9", "networks": ["10.0.0.0/8"]}
        assert_routing_takes_all(database)
        await registry.announce(config(app("web", "10.0.0.1:80")), "127.0.0.1:8080", 2000)
        assert database.rows("SELECT peering FROM nodes") == [("{}",)]

    async def test_restart_without_changes_changes_only_the_start(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        declared = config(app("web", "10.0.0.1:80"))
        await registry.announce(declared, "127.0.0.1:8080", 1000)
        before = database.rows("SELECT * FROM machines"), database.rows("SELECT * FROM services")
        (machine,) = names(database, "machines", "id")
        await registry.announce(declared, "127.0.0.1:8080", 2000)
        assert (database.rows("SELECT * FROM machines"), database.rows("SELECT * FROM services")) == before
        assert names(database, "machines", "id") == {machine}
        assert database.rows("SELECT started_ms FROM nodes") == [(2000,)]

    async def test_restart_leaves_a_machine_stopped_or_cordoned_as_it_was(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        declared = config(app("web", "10.0.0.1:80"))
        await registry.announce(declared, "127.0.0.1:8080", 1000)
        (machine,) = names(database, "machines", "id")
        await registry.change_machine(machine, "stop")
        await registry.change_machine(machine, "cordon")
        await registry.announce(declared, "127.0.0.1:8080", 2000)
        assert database.rows("SELECT state, cordoned FROM machines") == [("stopped", 1)]

    async def test_what_the_file_no_longer_declares_is_removed(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        await registry.announce(
            config(
                app("web", "10.0.0.1:80", "10.0.0.2:80", hosts=("a.test", "b.test")),
                app("old", hosts=("old.test",)),
            ),
            "127.0.0.1:8080",
            1000,
        )
        await registry.announce(config(app("web", "10.0.0.2:80", hosts=("b.test",))), "127.0.0.1:8080", 2000)
        assert names(database, "apps", "name") == names(database, "services", "app") == {"web"}
        assert names(database, "hostnames", "hostname") == {"b.test"}
        assert names(database, "machines", "address") == {"10.0.0.2:80"}
        await registry.announce(config(), "127.0.0.1:8080", 3000)
        for table in ("apps", "services", "hostnames", "machines"):
            assert database.rows(f"SELECT * FROM {table}") == []

    async def test_services_of_single_ports_come_and_go_with_the_file(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        db = AppConfig(
            name="db",
            hosts=(),
            internal_port=80,
            handlers=(),
            idle_timeout_ms=9,
            body_bytes_max=7,
            machines=(MachineConfig(address="10.0.0.1"),),
            services=(
                ServiceConfig(
                    port=5432, internal_port=15432, soft_limit=3, hard_limit=4, proxy_protocol="v2"
                ),
                ServiceConfig(
                    port=8443,
                    internal_port=8080,
                    handlers=("tls", "http"),
                    tls_versions=("TLSv1.3",),
                    body_bytes_max=5,
                ),
            ),
        )
        await registry.announce(config(db), "127.0.0.1:8080", 1)
        assert_routing_takes_all(database)
        columns = "port, internal_port, concurrency, soft_limit, hard_limit, options"
        sql = f"SELECT {columns} FROM services ORDER BY port"
        plain = '{"idle_timeout_ms":9,"body_bytes_max":7,"handlers":[]}'
        assert database.rows(sql) == [
            (0, 80, "connections", 20, None, plain),
            (5432, 15432, "connections", 3, 4, '{"proxy_protocol":"v2","handlers":[]}'),
            (8443, 8080, "requests", 20, None, '{"body_bytes_max":5,"tls_versions":["TLSv1.3"]}'),
        ]
        fewer = msgspec.structs.replace(db, services=db.services[:1])
        await registry.announce(config(fewer), "127.0.0.1:8080", 2)
        assert [row[0] for row in database.rows(sql)] == [0, 5432]
        await registry.announce(config(msgspec.structs.replace(db, services=())), "127.0.0.1:8080", 3)
        assert [row[0] for row in database.rows(sql)] == [0]

    async def test_changed_path_prefix_replaces_the_route(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        await registry.announce(config(app(path_prefix="/a/")), "127.0.0.1:8080", 1000)
        await registry.announce(config(app(path_prefix="/b/")), "127.0.0.1:8080", 2000)
        assert names(database, "hostnames", "path_prefix") == {"/b"}

    async def test_what_people_and_other_nodes_added_stays(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        await registry.add_app(app("by-hand", "10.0.0.5:80", hosts=("hand.test",)))
        other = Registry(database, "n2", "gru", ())
        await other.announce(
            config(app("elsewhere", "10.0.0.6:80", hosts=("else.test",))), "10.0.0.2:8080", 1000
        )
        await registry.announce(config(app()), "127.0.0.1:8080", 1000)
        await registry.announce(config(), "127.0.0.1:8080", 2000)
        assert names(database, "apps", "name") == {"by-hand", "elsewhere"}
        assert names(database, "machines", "address") == {"10.0.0.5:80", "10.0.0.6:80"}

    async def test_machine_that_is_a_listener_of_the_node_refuses_the_start(
        self, database: FakeDatabase, registry: Registry
    ) -> None:
        with pytest.raises(RegistryError, match="is a listener of this node itself"):
            await registry.announce(config(app("web", "127.0.0.1:8080")), "127.0.0.1:8080", 1000)
        assert database.transactions == []


async def test_options_change_one_by_one_and_null_takes_one_back(
    registry: Registry, database: FakeDatabase
) -> None:
    await registry.add_app(AppConfig(name="web", response_headers={"server": False, "x": "1"}))
    await registry.set_options(
        "web", {"maintenance": "Back soon", "response_headers": {"x": None, "y": ["2"]}}
    )
    ((options,),) = database.rows("SELECT options FROM services")
    assert json.loads(options) == {
        "response_headers": {"server": False, "y": ["2"]},
        "maintenance": "Back soon",
    }
    await registry.set_options("web", {"maintenance": None, "response_headers": None})
    assert database.rows("SELECT options FROM services") == [("{}",)]
    assert_routing_takes_all(database)


@pytest.mark.parametrize(
    "changes", [{"maintenence": ""}, {"response_headers": {"x y": "1"}}, {"maintenance": 1}]
)
async def test_options_that_routing_would_refuse_change_nothing(
    registry: Registry, database: FakeDatabase, changes: dict[str, object]
) -> None:
    await registry.add_app(app())
    with pytest.raises(RegistryError):
        await registry.set_options("web", {"proxy_protocol": "v1", **changes})
    assert database.rows("SELECT options FROM services") == [("{}",)]
    with pytest.raises(RegistryError, match="no app"):
        await registry.set_options("none", {})


async def test_primary_region_that_nobody_knows_and_where_no_node_is_is_doubted(
    registry: Registry, database: FakeDatabase
) -> None:
    doubt = (
        "primary_region: unknown region `moon-base`; give it coordinates under [regions.moon-base] "
        "(taken all the same: a node may come there)"
    )
    assert await registry.doubt_primary_region("moon-base") == [doubt]
    for known in ("", None, 5, "ams", "gru"):
        assert await registry.doubt_primary_region(known) == []
    database.put("nodes", id="n7", region="moon-base")
    assert await registry.doubt_primary_region("moon-base") == []


async def test_limits_and_checks_are_set_and_the_rest_stays(
    registry: Registry, database: FakeDatabase
) -> None:
    await registry.add_app(AppConfig(name="web", services=(ServiceConfig(port=5432),)))
    changes = {"checks": [{"path": "/up"}], "soft_limit": 5, "hard_limit": 9, "maintenance": "Soon"}
    await registry.set_options("web", changes)
    path = "json_extract(checks, '$[0].path')"
    sql = f"SELECT soft_limit, hard_limit, {path}, options FROM services ORDER BY port"
    options = '{"maintenance":"Soon"}'
    first, second = database.rows(sql)
    assert first == (5, 9, "/up", options)
    assert second[:3] == (5, 9, None)
    await registry.set_options("web", {"hard_limit": None, "checks": None})
    assert database.rows(sql)[0] == (5, None, None, options)
    assert_routing_takes_all(database)
    for wrong in ({"soft_limit": 0}, {"hard_limit": "x"}, {"checks": [{"path": "nonsense"}]}):
        with pytest.raises(RegistryError):
            await registry.set_options("web", {"maintenance": None, **wrong})
    assert database.rows(sql)[0] == (5, None, None, options)


async def test_what_an_app_says_of_replays_reaches_routing(
    registry: Registry, database: FakeDatabase
) -> None:
    rule = ReplayCacheConfig(type="cookie", name="sid", ttl_seconds=60, path_prefix="/a")
    said = {"replay_from": ("router",), "replay_cache": (rule,), "client_routing": False, "pristine": True}
    await registry.add_app(AppConfig(name="web", **said))
    ((text,),) = database.rows("SELECT options FROM services")
    options = parse_options(text)
    assert options is not None
    assert options.pristine
    assert options.replay.sources == {"router"}
    assert not options.replay.client_routing
    assert [(rule.prefix, rule.name, rule.ttl_s) for rule in options.replay.rules] == [(b"/a", b"sid", 60)]


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"replay_from": ("a b",)}, "no app"),
        (
            {"replay_cache": (ReplayCacheConfig(type="cookie", name="a b", ttl_seconds=60),)},
            "none of a cookie",
        ),
    ],
)
def test_what_routing_would_refuse_of_replays_is_refused_when_it_is_said(
    said: dict[str, object], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        AppConfig(name="web", **said)


async def test_what_an_app_says_of_compression_reaches_routing(
    registry: Registry, database: FakeDatabase
) -> None:
    wishes = CompressionConfig(codings=("gzip",), gzip_level=6)
    for said, level in ((wishes, 6), (True, LEVELS["gzip"])):
        await registry.add_app(AppConfig(name="web", compression=said))
        ((text,),) = database.rows("SELECT options FROM services")
        options = parse_options(text)
        assert options is not None
        assert options.compression is not None
        assert options.compression.gzip_level == level
    await registry.add_app(AppConfig(name="web"))
    assert database.rows("SELECT options FROM services") == [("{}",)]


async def test_how_an_app_is_balanced_reaches_routing(registry: Registry, database: FakeDatabase) -> None:
    machines = (MachineConfig(address="10.0.0.1:80", id="m1", weight=250),)
    await registry.add_app(
        AppConfig(
            name="web",
            machines=machines,
            sticky={"cookie": "at", "set": True},
            slow_start_ms=5_000,
            panic_percent=50,
            services=(ServiceConfig(port=81, handlers=("http",)), ServiceConfig(port=82)),
        )
    )
    assert database.rows("SELECT weight FROM machines") == [(250,)]
    texts = database.rows("SELECT options FROM services ORDER BY port")
    for (text,), sticky in zip(texts, (*[Sticky(cookie=b"at", sets=True)] * 2, None), strict=True):
        options = parse_options(text)
        assert options is not None
        assert (options.sticky, options.slow_start_s, options.panic_percent) == (sticky, 5.0, 50)


async def test_app_that_is_as_it_should_be_has_no_changes(registry: Registry, database: FakeDatabase) -> None:
    web = msgspec.structs.replace(
        app(), soft_limit=5, checks=(CheckConfig(path="/up"),), services=(ServiceConfig(port=5432),)
    )
    changes, hosts = await registry.compare_app(web)
    assert {"what": "service: soft_limit", "before": None, "after": 5} in changes
    assert {"what": "service: checks[0].path", "before": None, "after": "/up"} in changes
    assert {"what": "host web.test", "before": None, "after": "web"} in changes
    assert (hosts, database.transactions) == (["web.test"], [])
    await registry.add_app(web)
    assert await registry.compare_app(web) == ([], ["web.test"])
    other = msgspec.structs.replace(web, soft_limit=6, services=(), hosts=(), force_https=True)
    changes, hosts = await registry.compare_app(other)
    assert [change["what"] for change in changes if "port 5432" not in change["what"]] == [
        "service: force_https",
        "service: soft_limit",
    ]
    assert hosts == ["web.test"]


async def test_exact_app_loses_services_that_are_not_given(
    registry: Registry, database: FakeDatabase
) -> None:
    await registry.add_app(msgspec.structs.replace(app(), services=(ServiceConfig(port=5432),)))
    before = len(database.transactions)
    await registry.add_app(app(), exact=True, dry_run=True)
    assert len(database.transactions) == before
    await registry.add_app(app())
    assert database.rows("SELECT port FROM services ORDER BY port") == [(0,), (5432,)]
    await registry.add_app(app(), exact=True)
    assert database.rows("SELECT port FROM services") == [(0,)]


async def test_service_that_somebody_wrote_badly_can_be_compared(
    registry: Registry, database: FakeDatabase
) -> None:
    database.put("services", app="web", options="{", checks="[5]")
    changes, _ = await registry.compare_app(app())
    assert [change["what"] for change in changes] == ["host web.test"]


async def test_machine_that_is_added_later_runs_the_current_release(
    registry: Registry, database: FakeDatabase
) -> None:
    await registry.add_app(app())
    new = NewMachine(app="web", address="10.0.0.1:80", id="m1", driver="fly")
    await registry.add_machine(new)
    database.put("releases", app="web", version=1, release="v1", status="complete")
    database.put("releases", app="web", version=2, release="v2", status="complete")
    database.put("releases", app="web", version=3, release="v3", status="rolled back")
    database.put("releases", app="other", version=9, release="v9", status="complete")
    await registry.add_machine(msgspec.structs.replace(new, id="m2"))
    await registry.add_machine(new)
    sql = "SELECT machine, state, version, release FROM goals ORDER BY machine"
    assert database.rows(sql) == [("m1", "started", None, ""), ("m2", "started", 2, "v2")]
