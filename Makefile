# Everything runs in its own virtual environment; `make VENV=/some/where ...` puts it elsewhere.
VENV ?= .venv
PYTHON ?= python3
OUTPUT ?= out/demo
# Each worker takes whole files, so that what a file prepares is prepared once.
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist loadfile

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINED := $(PIP) install --quiet --constraint constraints.txt
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: help demo test test-slow lint format clean

help:
	@echo "make demo       install, then convert the embedded model and show what became of it"
	@echo "make test       install, then run the fast tests with their coverage"
	@echo "make test-slow  the long tests: every architecture, memory, speed"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff rewrite what it can"
	@echo "make clean      remove the environment and what tools left behind"

demo: $(INSTALLED)
	$(BIN)/attnconv demo --output $(OUTPUT)

test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term

test-slow: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .coverage .hypothesis

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
