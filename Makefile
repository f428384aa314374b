# The two commands: `make demo` and `make test`. README.md has the same lines for pip, for Windows.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint docs lock release bench bench-gpu clean

demo: $(READY)
	$(BIN)/echoquad demo

# Three processes, a test file in one of them: many tests of the service wait. Without -n all of it runs in one, as well.
test: $(READY) lint
	$(BIN)/python -m pytest -n 3 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation, into build/docs. Needs no network; a warning is an error.
docs: $(READY)
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs build/docs

# The versions in .venv, for an environment that is the same elsewhere; see CONTRIBUTING.md.
lock: $(READY)
	echo "# Versions of every package in the development environment; \`make lock\` writes this file." > requirements-dev.lock
	$(BIN)/python -m pip list --format=freeze --exclude-editable --exclude pip --exclude setuptools >> requirements-dev.lock

# Wheel, source distribution, bill of materials and SHA256SUMS of the last commit, into dist/; signed with KEY=key.pem.
KEY ?=
release: $(READY)
	$(BIN)/python export/release.py $(if $(KEY),--key $(KEY))

# On a network and frames of your own: make bench RUN=run BUNDLE=bundle FRAMES=frames MINUTES=10
RUN ?= demo/run
BUNDLE ?= demo/bundle
FRAMES ?= demo/data/test
MINUTES ?= 0
RESULTS ?= benchmarks/RESULTS.md
OPENVINO_PYTHON ?= # of an environment with onnxruntime-openvino and openvino
GIVEN := --frames $(FRAMES) --results $(RESULTS)

bench: $(READY)
	test -d $(BUNDLE) -a -d $(FRAMES) || $(MAKE) demo
	$(BIN)/python benchmarks/peers.py $(RUN) $(BUNDLE) --formats rgb-png,l-png,rgb-jpeg,grey-jpeg $(GIVEN)
	$(BIN)/python benchmarks/engines.py $(RUN) $(BUNDLE) --rounds 30 --results $(RESULTS) \
	  $(addprefix --openvino-python ,$(OPENVINO_PYTHON))
	$(BIN)/python benchmarks/efficiency.py $(BUNDLE) $(GIVEN)
	$(BIN)/python benchmarks/latency.py $(BUNDLE) --minutes $(MINUTES) $(GIVEN)
	$(BIN)/python benchmarks/memory.py $(BUNDLE) $(GIVEN)
	$(BIN)/python benchmarks/scaling.py $(BUNDLE) --counts 1,10,100,1000 $(GIVEN)
	frame=$$(find $(FRAMES) -name '*.png' -o -name '*.jpg' | sort | head -n 1) && \
	$(BIN)/python benchmarks/startup.py $(BUNDLE) "$$frame" --results $(RESULTS)

# On a machine with a GPU; see docs/how-to/gpu.md. It may have no package registry: where there is no .venv, PYTHON runs it.
DATA ?=
GPU ?=
bench-gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(RUN) $(BUNDLE) $(GIVEN) $(if $(DATA),--data $(DATA)) $(GPU)

clean:
	rm -rf $(VENV) demo build dist

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[all,dev]"
	touch $(READY)
