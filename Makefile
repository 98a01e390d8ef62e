# Every target sets up what it needs; nothing outside this folder is touched.
.PHONY: setup demo check test clean
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
BASE_PORT ?= 8080
STAMP := $(VENV)/.installed

help:
	@echo "make demo    three regions on this machine, with something to try"
	@echo "make test    unit, property and end-to-end tests"
	@echo "make check   lint, types, import contracts"
	@echo "make clean   remove the virtual environment and caches"

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "isthmus needs Python 3.11 or newer: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "isthmus needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version); set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "this Python has no venv module: apt-get install python3-venv"; exit 1; }
	@echo "setting up $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,e2e]'
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

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
