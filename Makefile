# The two commands: `make demo` and `make test`. README.md has the same in plain pip, for Windows.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint bench clean

demo: $(READY)
	$(BIN)/echoquad demo

test: $(READY) lint
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	test -d demo/bundle || $(MAKE) demo
	$(BIN)/python benchmarks/engines.py demo/run demo/bundle

clean:
	rm -rf $(VENV) demo build dist

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[all,dev]"
	touch $(READY)
