# Everything that a clone needs, in a virtual environment of its own (.venv).
#
#   make quickstart   tune the default base on the smart-home example, and read replies of base and tuned model
#   make test         all tests but those that need a GPU; the first run fetches the default base
#   make test-fast    the tests that need no fetched base
#   make lint         style, types and the layers
#   make setup        the environment alone
#   make clean        remove the environment and caches; runs/ and the fetched bases stay
#
# Variables: PYTHON (python3), TORCH (torch==2.13.0; `make setup TORCH=torch` takes the newest), RUN (the quickstart's
# run folder; by default runs/quickstart, or the first free runs/quickstart-N), WORKERS (processes that share the tests;
# by default one a core, and eight at most).

PYTHON ?= python3
TORCH ?= torch==2.13.0
RUN ?=
WORKERS ?= logical

BIN := .venv/bin
STAMP := .venv/installed

.DELETE_ON_ERROR:
.PHONY: help setup quickstart test test-fast lint clean

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; name one: make PYTHON=python3.12"; exit 2; }
	@echo "setup: creating .venv"
	@$(PYTHON) -m venv .venv
	@echo "setup: installing $(TORCH)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check "$(TORCH)"
	@echo "setup: installing luthier and its other requirements"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[dev]"
	@touch $@
	@echo "setup: done"

quickstart: $(STAMP)
	@BIN=$(BIN) sh examples/smart_home/quickstart.sh $(RUN)

# A thread a worker: threads of several workers on the same cores would wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

test: $(STAMP)
	@$(PYTEST) -m "not gpu"

test-fast: $(STAMP)
	@$(PYTEST) -m "not gpu and not real"

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist src/*.egg-info
