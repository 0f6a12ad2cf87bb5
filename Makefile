# Everything runs from .venv, made here from locked dependencies; nothing is installed outside the checkout.
PYTHON ?= $(shell tools/which-python)
VENV := .venv
BIN := $(VENV)/bin

COMPILED := build/compiled
SOURCES := $(shell find src -name '*.py' -o -name '*.c')

.PHONY: serve test test-compiled check bench compiled lock clean

serve: $(VENV)/installed
	$(BIN)/tertulia serve

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(ARGS)

test-compiled: $(COMPILED)/done  ## the compiled package under the tests that talk to servers
	TERTULIA_TEST_PACKAGE=$(CURDIR)/$(COMPILED) $(BIN)/python -m pytest tests/wire/test_repeated.py tests/wire/test_pipelined.py tests/wire/test_refusals.py \
	  tests/wire/test_upstream.py tests/wire/test_cache.py tests/wire/test_reload.py tests/faults/test_matrix.py \
	  tests/faults/test_endings.py tests/faults/test_server.py $(ARGS)

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check src tests bench examples
	$(BIN)/ruff check src tests bench examples
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/house

bench: $(VENV)/installed-dev
	$(BIN)/python bench/local.py

compiled: $(COMPILED)/done  ## the package with its hot path compiled; needs gcc and Python.h

$(COMPILED)/done: $(VENV)/installed-dev setup.py $(SOURCES)
	@echo "compiling the hot path: about half a minute" >&2
	@rm -rf $(COMPILED) && mkdir -p $(COMPILED)
	TERTULIA_COMPILE=1 $(BIN)/python setup.py --quiet build --build-lib $(COMPILED) --build-temp build/temp
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Tertulia needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && apt-get install -y -q python3-venv; \
	  else echo "Python's venv module is missing; on Debian: sudo apt-get install python3-venv"; exit 1; fi; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python requirements.lock pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

lock:  ## re-resolves both lock files; needs uv
	uv pip compile pyproject.toml --group build --universal --python-version 3.11 --generate-hashes --no-header -q -U -o requirements.lock
	uv pip compile pyproject.toml --all-extras --group build --group dev --universal --python-version 3.11 --generate-hashes --no-header -q -U -o requirements-dev.lock

clean:
	rm -rf $(VENV) .venvs build .pytest_cache .mypy_cache .ruff_cache
