"""What `isthmus status` makes of what a node says."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from isthmus.commands.status import describe_status, find_problems
from isthmus.reloading import Lifecycle

NOW_MS = 1_700_000_000_000
REPLICATION: dict[str, Any] = {
    "read_only": None,
    "site_conflict": None,
    "schema_problem": "",
    "own_versions_lost": 0,
    "parked": 0,
    "deferred": [],
    "apply_queue": 0,
    "sites": {"aa": {"head": 5, "last": 5, "gaps": []}},
}


def status(replication: dict[str, Any] | None = None, **said: Any) -> dict[str, Any]:
    return {
        "node": "n1",
        "region": "ams",
        "software": "isthmus 1",
        "workers": 2,
        "workers_following": ["worker-0/1", "worker-1/2"],
        "lifecycle": msgspec.structs.asdict(Lifecycle()),
        "replication": REPLICATION | (replication or {}),
        "rejected_rows": [],
        "staged": {"waiting": 0, "quarantined": 0},
        "rollout": {"running": None, "failed": [], "behind": []},
        **said,
    }


def node(name: str, state: str = "alive", staleness_ms: int | None = 300) -> dict[str, Any]:
    is_self = name == "n1"
    started_ms = NOW_MS - 7_200_000 if is_self else None
    told = {"node": name, "state": state, "staleness_ms": staleness_ms}
    return {**told, "self": is_self, "started_ms": started_ms}


def app(name: str = "web", machines: int = 2, routable: int = 2) -> dict[str, Any]:
    return {"app": name, "machines": machines, "routable": routable}


def told(said: dict[str, Any], *nodes: dict[str, Any]) -> dict[str, str]:
    return dict(describe_status(said, nodes or (node("n1"),), (app(),), NOW_MS))


def test_all_is_well() -> None:
    nodes = (node("n1"), node("n2"), node("n3", staleness_ms=900), node("n4", "left", 99_000))
    assert told(status(), *nodes) == {
        "node": "n1, region ams, isthmus 1, up 2 h",
        "workers": "2 of 2 follow the table",
        "nodes": "3 of 3 alive, 1 left",
        "table": "has all that others wrote until 0.9 s ago (n3)",
        "serves": "1 app, 2 of 2 machines routable",
        "problems": "none; `isthmus doctor` looks deeper",
    }


def test_node_that_runs_in_one_process_has_one_worker() -> None:
    assert told(status(workers=0, workers_following=["worker-0/1"]))["workers"] == "1 of 1 follow the table"


def test_what_is_missing_is_counted() -> None:
    behind = {"sites": {"aa": {"head": 5, "last": 12, "gaps": [[6, 8], [11, 11]]}}, "apply_queue": 3}
    nodes = (node("n1"), node("n2", staleness_ms=None), node("n3"))
    assert told(status(behind), *nodes)["table"] == (
        "not known yet how old what n2 writes is; 4 changesets missing, 3 to be applied"
    )


def test_rollout_that_runs_is_told() -> None:
    rollout = {"running": {"kind": "config", "id": "ab12"}, "failed": []}
    assert told(status(rollout=rollout))["rollout"] == "config ab12 is under way"


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (status({"read_only": "disk full, since noon"}), "takes no writes: disk full, since noon"),
        (status(workers_following=["worker-0/1"]), "1 worker of 2 on an old table, or not running"),
        (
            status({"site_conflict": {"name": "n9"}}),
            "node n9 runs with the same site id: one is a copy",
        ),
        (status({"schema_problem": "no column x"}), "schema: no column x"),
        (status({"own_versions_lost": 1}), "the database file is old: only others had 1 version of its own"),
        (status({"parked": 2}), "2 changesets could not be applied: isthmus db parked"),
        (status({"deferred": ["loads"]}), "what was written to loads waits for its limit of writes"),
        (
            status(lifecycle=msgspec.structs.asdict(Lifecycle(reload_problem="line 3"))),
            "the last reload was refused: line 3",
        ),
        (
            status(lifecycle=msgspec.structs.asdict(Lifecycle(upgrade_problem="no program"))),
            "the last upgrade was refused: no program",
        ),
        (
            status(lifecycle=msgspec.structs.asdict(Lifecycle(kept="worker-0: no file"))),
            "still with its former settings: worker-0: no file",
        ),
        (
            status(rejected_rows=[{"table": "services", "key": ["web", "0"], "reason": "bad"}]),
            "a row of services cannot be used: web, 0: bad",
        ),
        (status(staged={"quarantined": 1}), "1 change of the table did harm and wait: isthmus staged"),
        (
            status(rollout={"running": None, "failed": ["ab12"]}),
            "this node could not take up ab12: isthmus rollout show ab12",
        ),
    ],
)
def test_what_needs_somebody_is_a_problem(said: dict[str, Any], problem: str) -> None:
    assert list(find_problems(said, (node("n1"),), (app(),))) == [problem]


def test_nodes_and_apps_that_are_away_are_problems() -> None:
    nodes = (node("n1"), node("n2", "dead"), node("n3", "suspect"), node("n4", "unknown"), node("n5", "left"))
    apps = (app(), app("down", routable=0), app("empty", 0, 0))
    assert list(find_problems(status(), nodes, apps)) == [
        "app down is down: none of its 2 machines is routable",
        "node n2 is dead",
        "node n3 does not answer",
        "node n4 has a row, but is no member",
    ]
    assert dict(describe_status(status(), nodes, apps, NOW_MS))["nodes"] == "1 of 4 alive, 1 left"


def test_many_problems_are_cut_short() -> None:
    nodes = [node(f"n{number}", "dead") for number in range(2, 40)]
    *_, last = describe_status(status(), nodes, (), NOW_MS)
    assert last == ("", "and 26 more")
