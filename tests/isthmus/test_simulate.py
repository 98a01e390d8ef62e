"""`isthmus simulate`: what it prints, and its exit codes."""

import pathlib
import re
import shlex

import pytest

from isthmus import cli
from replication.simulator import simulation
from replication.simulator.faults import FAULTS
from replication.simulator.planted import PLANTED

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "simulation.md"


@pytest.fixture
def planted(monkeypatch):
    """Make every run one with a bug."""
    real = simulation.run
    monkeypatch.setattr(
        simulation, "run", lambda scenario, trace=None: real(scenario, build=PLANTED["torn"], trace=trace)
    )


def test_prints_the_seed_and_what_came_of_it(capsys):
    assert cli.main(["simulate", "--nodes", "3", "--seed", "7", "--seconds", "10"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("seed      7, 3 nodes")
    for word in ("messages", "payloads", "faults", "checks", "equal"):
        assert re.search(rf"^{word} +\S", printed, re.MULTILINE)


def test_prints_a_line_for_each_of_several_seeds(capsys):
    assert cli.main(["simulate", "--seeds", "3", "--seed", "4", "--seconds", "5"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "seed 4", "seed 5", "seed 6",
    ]  # fmt: skip


def test_a_failure_tells_what_led_to_it_and_the_command_that_it_prints_shows_it_again(planted, capsys):
    assert cli.main(["simulate", "--seconds", "20", "--seed", "3", "--faults", "loss,partition"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^ +\d+\.\d{3} s  node \d +writes t\d+ as version \d+$", printed, re.MULTILINE)
    assert "seed 3 FAILED: atomic: node" in printed
    program, *again = shlex.split(printed.splitlines()[-1].removeprefix("again: "))
    assert program == "isthmus"
    assert cli.main(again) == 1
    assert capsys.readouterr().out == printed


def test_writes_the_trace_to_a_file(tmp_path):
    path = tmp_path / "trace"
    assert cli.main(["simulate", "--seconds", "2", "--faults", "none", "--trace", str(path)]) == 0
    assert "n0 starts as site" in path.read_text()


@pytest.mark.parametrize("wrong", [["--faults", "rain"], ["--nodes", "1"], ["--faults", "loss,"]])
def test_refuses_what_cannot_be_run(wrong, capsys):
    assert cli.main(["simulate", *wrong]) == 2
    assert capsys.readouterr().err.startswith("isthmus: ")


def test_every_fault_is_documented():
    text = DOCS.read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)[: len(FAULTS)] == list(FAULTS)
