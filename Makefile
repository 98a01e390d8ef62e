# Every target sets up what it needs; nothing outside this folder is touched.
.PHONY: help setup demo check test bench bench-replication bench-simulated soak chaos clean
.DEFAULT_GOAL := help

BIN := .venv/bin
STAMP := .venv/.installed
PYTHON ?= python3
# The demo's ports are counted from here.
BASE_PORT ?= 8080
# Simulated clusters in a soak, a fraction of a second each.
SEEDS ?= 300
# What the runs of bench-simulated follow from; about eight minutes of one core each.
SIMULATED_SEEDS ?= 1
# How often a writer is killed, a third of a second each.
KILLS ?= 300

help:
	@echo "make demo    three regions on this machine, with something to try"
	@echo "make test    unit, property and end-to-end tests"
	@echo "make check   lint, types, import contracts"
	@echo "make bench   CPU per request beside nginx and HAProxy; make bench-replication: beside cr-sqlite"
	@echo "make bench-simulated  a thousand simulated nodes; an hour without a region"
	@echo "make soak    simulate many clusters with faults; SEEDS=1000 says how many"
	@echo "make chaos   kill -9 a writer at random moments and look at what it left; KILLS=1000 says how often"
	@echo "make setup   only the virtual environment, .venv"
	@echo "make clean   remove it, and caches"

$(STAMP): pyproject.toml
	@PYTHON='$(PYTHON)' .ci/setup
	@touch $@

setup: $(STAMP)

demo: setup
	@exec $(BIN)/isthmus demo --base-port $(BASE_PORT)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: setup
	$(BIN)/python -m pytest

bench: setup
	@$(BIN)/python -m bench.proxy

bench-replication: setup
	@$(BIN)/python -m bench.replication

bench-simulated: setup
	@$(BIN)/python -m bench.replication.simulated --seeds $(SIMULATED_SEEDS)

soak: setup
	$(BIN)/isthmus simulate --seeds $(SEEDS)

chaos: setup
	@$(BIN)/python -m tests.chaos --kills $(KILLS)

clean:
	rm -rf .venv bench/replication/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
