# Everything runs in its own virtual environment; `make VENV=/some/where ...` puts it elsewhere.
VENV ?= .venv
PYTHON ?= python3
OUTPUT ?= out/demo
# Each worker takes whole files, so that what a file prepares is prepared once.
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist loadfile
# The tests start dozens of processes, and each would compile the whole package anew.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINED := $(PIP) install --quiet --constraint constraints.txt
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

# Two more environments beside the first: without constraints, and with the lowest versions that pyproject.toml admits.
NEWEST := $(VENV)-newest
OLDEST := $(VENV)-oldest
# What the registry has today is asked for once a day.
INSTALLED_NEWEST := $(NEWEST)/.installed-$(shell date +%F)
INSTALLED_OLDEST := $(OLDEST)/.installed
COMPAT := -m pytest -m compat $(PARALLEL)

.PHONY: help demo test coverage test-newest test-oldest test-slow lint format clean newest oldest

help:
	@echo "make demo       install, then convert the embedded model and show what became of it"
	@echo "make test       install, then run the fast tests"
	@echo "make coverage   the same, and which lines they ran; tracing makes them half as long again"
	@echo "make test-newest, make test-oldest"
	@echo "                the tests that count for every set of versions, with the newest and with the lowest"
	@echo "make test-slow  the long tests: every architecture, memory, speed"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff rewrite what it can"
	@echo "make clean      remove the environment and what tools left behind"

demo: $(INSTALLED)
	$(BIN)/attnconv demo --output $(OUTPUT)

test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest $(PARALLEL)

coverage: $(INSTALLED_DEV)
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term

test-newest: $(INSTALLED_NEWEST)
	$(NEWEST)/bin/python $(COMPAT)

test-oldest: $(INSTALLED_OLDEST)
	$(OLDEST)/bin/python $(COMPAT)

newest: $(INSTALLED_NEWEST)
oldest: $(INSTALLED_OLDEST)

test-slow: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -m slow $(PARALLEL)

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-newest .venv-oldest .mypy_cache .pytest_cache .ruff_cache .coverage .hypothesis

# torch goes first and alone: with it in place, nothing that depends on torch pulls another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "the tested versions need Python 3.11 or newer; name one with PYTHON=python3.12"; exit 1; }
	@echo "Installing the tested versions into $(VENV); the first time this takes some minutes."
	@$(PYTHON) -m venv $(VENV)
	$(CONSTRAINED) torch
	$(CONSTRAINED) --editable .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(CONSTRAINED) --editable '.[dev]'
	@touch $@

# As a user would install it: the wheel, into an empty environment, with whatever the registry has. Only torch is the
# tested one, whose build for CPUs is at hand, and stays.
TORCH := $(shell grep '^torch==' constraints.txt)
NEWEST_PIP := $(NEWEST)/bin/python -m pip --disable-pip-version-check
UNCONSTRAINED := $(NEWEST_PIP) install --quiet --upgrade --upgrade-strategy eager $(TORCH)
$(INSTALLED_NEWEST): pyproject.toml constraints.txt
	@echo "Installing the newest versions into $(NEWEST)"
	@$(PYTHON) -m venv $(NEWEST)
	@rm -rf $(NEWEST)/.installed-* $(NEWEST)/dist
	$(UNCONSTRAINED)
	$(NEWEST_PIP) uninstall --quiet --yes attnconv
	$(NEWEST_PIP) wheel --quiet --no-deps --wheel-dir $(NEWEST)/dist .
	$(UNCONSTRAINED) $(NEWEST)/dist/attnconv-*.whl
	cd $(NEWEST) && bin/python -c 'import attnconv; assert "site-packages" in attnconv.__file__, attnconv.__file__'
	cd $(NEWEST) && bin/attnconv doctor
	$(UNCONSTRAINED) --editable '.[test]'
	@touch $@

OLDEST_PIP := $(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-oldest.txt
$(INSTALLED_OLDEST): pyproject.toml constraints-oldest.txt
	@echo "Installing the lowest versions into $(OLDEST)"
	@$(PYTHON) -m venv $(OLDEST)
	$(OLDEST_PIP) torch
	$(OLDEST_PIP) --editable '.[test]'
	@touch $@
