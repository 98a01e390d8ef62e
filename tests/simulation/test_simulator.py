"""The simulator: what it promises of a run, that its faults are real, and that its checkers find bugs."""

import hashlib
import io
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from replication.simulator.checkers import InvariantError
from replication.simulator.faults import FAULTS, USUAL
from replication.simulator.planted import PLANTED
from replication.simulator.simulation import Scenario, Simulation, run

# A few dozen here; `make soak` runs as many as one likes.
SEEDS = range(1, 33)
SHORT_SEEDS = range(100, 300)
# Seeds that have found a bug once; each stays here for good.
FOUND_SOMETHING = {
    21: "a read of the store that failed let sqlite3's own error through",
    95: "a transaction that was interrupted as it began stayed open, and no other could begin",
    1037: "a node that had just started forgot deletions, as it knew of nobody who might not have them",
}


def run_script(seed: int, hash_seed: str) -> bytes:
    script = (
        "import sys; from replication.simulator.simulation import Scenario, run; "
        f"run(Scenario(seed={seed}, nodes=7, seconds=20), trace=sys.stdout.buffer)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        check=True,
        timeout=60,
    )
    return done.stdout


@pytest.mark.parametrize("seed", [1, 21])
def test_the_same_seed_gives_the_same_trace_in_processes_that_hash_differently(seed):
    first = run_script(seed, "1")
    assert len(first.splitlines()) > 1_000
    assert first == run_script(seed, "2")


def test_another_seed_gives_another_trace():
    assert run(Scenario(seed=1, seconds=5)).trace_hash != run(Scenario(seed=2, seconds=5)).trace_hash


def test_the_written_trace_is_what_the_hash_is_of():
    sink = io.BytesIO()
    report = run(Scenario(seed=3, seconds=5), trace=sink)
    assert hashlib.blake2b(sink.getvalue(), digest_size=16).hexdigest() == report.trace_hash


@pytest.mark.parametrize("seed", FOUND_SOMETHING, ids=str)
def test_seeds_that_once_found_a_bug_pass(seed):
    report = run(Scenario(seed=seed))
    assert report.failure is None, "\n".join([*report.timeline, str(report.failure)])


def test_holds_over_many_seeds_with_every_kind_of_fault_and_of_repair():
    fired: Counter[str] = Counter()
    checks: Counter[str] = Counter()
    counters: Counter[str] = Counter()
    for seed in SEEDS:
        report = run(Scenario(seed=seed))
        assert report.failure is None, "\n".join([*report.timeline, f"seed {seed}: {report.failure}"])
        assert report.writes > 10, f"seed {seed}"
        fired += report.fired
        checks += report.checks
        counters += report.counters
    assert all(fired[kind] > 15 for kind in USUAL), fired
    assert all(counters[name] > 10 for name in COUNTED), counters
    assert all(checks[name] > 100 for name in CHECKED), checks


def test_holds_over_hundreds_of_seeds_of_a_short_life():
    fired: Counter[str] = Counter()
    for seed in SHORT_SEEDS:
        report = run(Scenario(seed=seed, seconds=10))
        assert report.failure is None, "\n".join([*report.timeline, f"seed {seed}: {report.failure}"])
        fired += report.fired
    assert all(fired[kind] > 10 for kind in USUAL), fired


# Each says that a fault did something, or that a way to recover was taken.
COUNTED = (
    "datagrams_lost", "datagrams_duplicated", "datagrams_cut", "frames_stalled", "frames_retransmitted",
    "payloads_pushed", "payloads_synced", "snapshots_adopted", "killed_in_transaction", "writes_refused",
    "merges_failed", "changesets_parked", "identities_renewed", "pauses",
)  # fmt: skip
CHECKED = (
    "atomic", "commits_numbered", "memory_bounded", "no_write_lost", "replicas_equal", "seen_means_applied",
    "versions_never_reused",
)  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_each_kind_of_fault_alone_is_survived_and_fires(kind):
    report = run(Scenario(seed=1, seconds=60, faults=(kind,), writes_per_s=2))
    assert report.failure is None
    assert report.fired[kind] > 0


def test_what_a_vandal_did_past_the_triggers_is_healed_whatever_else_goes_wrong():
    reports = [run(Scenario(seed=seed, faults=(*USUAL, "vandal"))) for seed in range(1, 6)]
    assert [report.failure for report in reports] == [None] * len(reports)
    assert sum(report.fired["vandal"] for report in reports) > 5
    assert sum(report.counters["rows_healed"] for report in reports) > 2


@pytest.mark.parametrize(
    ("bug", "faults", "check"),
    [
        ("seen-before-commit", ("io", "loss"), "seen_means_applied"),
        ("tie-by-arrival", ("loss", "partition"), "replicas_equal"),
        ("gap-not-asked", ("partition", "pause"), "convergence"),
        ("identity-kept", ("power",), "versions_never_reused"),
        ("torn", (), "atomic"),
    ],
)
def test_a_planted_bug_is_caught_within_a_few_seeds_and_shows_again_with_its_seed(bug, faults, check):
    for seed in range(1, 13):
        scenario = Scenario(seed=seed, seconds=20, faults=faults, converge_s=40)
        broken = run(scenario, build=PLANTED[bug])
        if broken.failure is not None:
            break
    assert broken.failure is not None, "no seed shows it"
    assert broken.failure.check == check
    assert "CHECK FAILED" in broken.timeline[-1]
    again = run(scenario, build=PLANTED[bug])
    assert (again.trace_hash, str(again.failure)) == (broken.trace_hash, str(broken.failure))
    assert run(scenario).failure is None


def test_without_faults_far_fewer_than_two_copies_of_a_changeset_go_to_each_node():
    reports = [run(Scenario(seed=seed, nodes=10, seconds=30, faults=())) for seed in (1, 2, 3)]
    assert all(report.failure is None for report in reports)
    assert 1 <= sum(report.payloads_per_node for report in reports) / len(reports) < 1.7


def test_a_memory_over_its_bound_ends_the_run(monkeypatch):
    simulation = Simulation(Scenario(seed=1, seconds=5, faults=()))
    monkeypatch.setattr("replication.core.plumtree.Plumtree.measure", lambda _: {"recent": (65, 64)})
    failure = simulation.run().failure
    assert isinstance(failure, InvariantError)
    assert failure.check == "memory_bounded"


def test_an_error_that_nobody_expects_is_a_failure_with_a_timeline(monkeypatch):
    def raise_error(*_: object) -> None:
        raise KeyError("who")

    monkeypatch.setattr("replication.core.swim.Swim.tick", raise_error)
    report = run(Scenario(seed=1, seconds=5, faults=()))
    assert report.failure is not None
    assert re.fullmatch(r"errors_handled: node \d: KeyError: 'who'", str(report.failure))
    assert "starts as site" in report.timeline[0]


@pytest.mark.parametrize("wrong", [{"faults": ("rain",)}, {"nodes": 1}, {"seconds": 0}, {"writes_per_s": 0}])
def test_refuses_a_scenario_that_cannot_be_run(wrong):
    with pytest.raises(ValueError, match=r"unknown|nodes"):
        Scenario(**wrong)
