# `make demo` and `make test` need nothing but Python 3.11 or newer: each sets up what it needs in .venv, once.
# PYTHON names the interpreter to build .venv with; TORCH another build, e.g. TORCH="torch==2.13.0 --index-url URL".

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint types arrows check clean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1	\2/' | expand -t 16

demo: $(VENV)/.installed ## search the built-in world and show the best image and its cost
	$(BIN)/tsdiff search --policy beam

test: $(VENV)/.installed-dev ## run the tests
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -q

lint: $(VENV)/.installed-dev ## look for mistakes and unsorted imports
	$(BIN)/ruff check

types: $(VENV)/.installed-dev ## check the core's types, strictly
	$(BIN)/mypy

arrows: $(VENV)/.installed-dev ## check who imports whom
	$(BIN)/lint-imports --no-logo

check: lint types arrows test ## all of the above

clean: ## remove .venv and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find tsdiff tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first, so that whatever build is meant stays; the constraints then keep it and choose all the rest.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tsdiff needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(INPUTS)
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch $(INPUTS)
	$(PIP) -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.installed
