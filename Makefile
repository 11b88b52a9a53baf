# Two commands for a newcomer: `make demo` and `make test`. Both set themselves up; all they need is Python >= 3.11 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint format types layers check wheel-test docs clean

help:  ## What there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "agentfleet needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV) || $(PYTHON) -m venv --without-pip $(VENV)
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cli,client,jsonschema,kubernetes,server,sql]' --group dev
	@touch $@

demo: $(STAMP)  ## A real fleet lives, is hurt and heals before your eyes (under two minutes)
	$(BIN)/agentfleet demo --report build/demo-report.json

test: $(STAMP) lint types layers  ## Everything that must hold: lint, types, layers, tests, and the tests on the built wheel
	$(BIN)/python -m pytest --numprocesses 3 --dist loadgroup $(PYTEST_ARGS)
	$(MAKE) --no-print-directory wheel-test

wheel-test: $(STAMP)  ## The built wheel against the source tree, and tests on it
	$(BIN)/python tests/run_on_wheel.py

bench: $(STAMP)  ## The figures, each with how it grows
	$(BIN)/python -m benchmarks

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/mypy

layers: $(STAMP)
	$(BIN)/lint-imports

check: lint types layers  ## The static gates alone

clean:  ## Remove what was built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .hypothesis .import_linter_cache
