# Everything that is done to this repository has a target here. `make help` lists them.

PYTHON ?= python3
# More arguments for pip, for example `make setup PIP_ARGS='--extra-index-url ...'` to get CPU builds of torch.
PIP_ARGS ?=
PYTEST_ARGS ?=
# Processes among which `make test` divides the tests; 0: all in one, in the order of the files.
TEST_PROCESSES ?= 2

VENV := .venv
BIN := $(VENV)/bin
PROTO_VENV := .venv-proto
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS)

# What a stamp says: these extras of this pyproject.toml are installed. A second run finds the stamp and does nothing.
DEMO_STAMP := $(VENV)/.installed-demo
DEV_STAMP := $(VENV)/.installed-dev
PROTO_STAMP := $(PROTO_VENV)/.installed

# Python files that the checks look at.
SOURCES := client worker proto tests examples scripts $(wildcard benchmarks)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- set up -----------------------------------------------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Python 3.11 to 3.13 is needed; '$(PYTHON)' is not. Try: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(DEMO_STAMP): pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[demo]'
	@touch $@

$(DEV_STAMP): pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[demo,dev]'
	@touch $(DEMO_STAMP) $@

$(PROTO_STAMP): scripts/proto-requirements.txt
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -r $<
	@touch $@

.PHONY: setup
setup: $(DEV_STAMP) ## Make .venv with everything that development needs.

# --- run --------------------------------------------------------------------------------------------------------------

.PHONY: demo
demo: $(DEMO_STAMP) ## Bring a cluster up, train on digits, write a report, take the cluster down.
	$(BIN)/python examples/digits_demo.py

# --- test -------------------------------------------------------------------------------------------------------------

.PHONY: test
test: $(DEV_STAMP) ## Run every test but the slow and the GPU ones.
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --durations=25 --durations-min=5 -m 'not slow and not gpu' $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: $(DEV_STAMP) ## Run the slow tests: every model of every family.
	$(BIN)/python -m pytest -m 'slow and not gpu' $(PYTEST_ARGS)

.PHONY: test-gpu
test-gpu: $(DEV_STAMP) ## Run the tests that need CUDA.
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

# --- check ------------------------------------------------------------------------------------------------------------

.PHONY: check
check: lint types imports typos buf proto-check wheel-check ## Run every check.

.PHONY: format
format: $(DEV_STAMP) ## Format the code and mend what ruff can mend.
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

.PHONY: lint
lint: $(DEV_STAMP) ## Check style, banned imports and calls that can run what they load.
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/python scripts/forbidden_calls.py $(filter-out tests,$(SOURCES))

.PHONY: types
types: $(DEV_STAMP) ## Check types: strictly in client and wire, ordinarily in the worker.
	$(BIN)/mypy -p trunkline -p trunkline_wire -p trunkline_worker
	$(BIN)/mypy --allow-untyped-calls examples scripts

.PHONY: imports
imports: $(DEV_STAMP) ## Check who may import whom.
	$(BIN)/lint-imports

.PHONY: typos
typos: $(DEV_STAMP) ## Check spelling.
	$(BIN)/typos

.PHONY: proto
proto: $(PROTO_STAMP) ## Regenerate the committed protobuf code.
	proto/generate.sh "$(CURDIR)/$(PROTO_VENV)/bin/python"

.PHONY: proto-check
proto-check: $(PROTO_STAMP) ## Check that the committed protobuf code is what the pinned generator writes.
	$(PYTHON) scripts/proto_check.py "$(CURDIR)/$(PROTO_VENV)/bin/python"

.PHONY: buf
buf: $(DEV_STAMP) ## Lint the protos and refuse changes that break older clients.
	$(BIN)/buf lint
	$(BIN)/python scripts/buf_breaking.py $(BIN)/buf

.PHONY: wheel-check
wheel-check: $(DEV_STAMP) ## Build the wheel, look inside, and use it where nothing else is installed.
	$(BIN)/python scripts/wheel_check.py

.PHONY: clean
clean: ## Remove environments, caches and build output.
	rm -rf $(VENV) $(PROTO_VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find client worker proto tests examples scripts -name __pycache__ -type d -prune -exec rm -rf {} +
