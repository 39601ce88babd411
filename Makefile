# `make test` and `make reproduce` need Python >= 3.10 and make, nothing else: they make .venv, install, run.
#   PYTHON=python3.12        another interpreter
#   VENV=path                another place for the virtual environment
#   TORCH_INDEX=url          where to take torch from, e.g. the CPU-only index named on PyTorch's install page
#   ARGS="..."               passed on: make test ARGS="tests/test_packaging.py -x", make reproduce ARGS="knn --preset full"
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

.PHONY: help test reproduce bench stress docs lint format build clean
help:
	@echo "make test        install into $(VENV) and run the test suite"
	@echo "make reproduce   install into $(VENV), train the experiments, write report/index.html"
	@echo "make bench       install the peers, too, and write benchmarks/results/"
	@echo "make docs        install Sphinx and write docs/_build/html; a warning is an error"
	@echo "make stress      100,000 random problems, checked again; benchmarks/results/stress.md"
	@echo "make lint        ruff check, ruff format --check, mypy"
	@echo "make format      ruff check --fix, ruff format"
	@echo "make build       a wheel into dist/"
	@echo "make clean       remove $(VENV), caches and builds"

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(ARGS)

reproduce: $(VENV)/.installed
	$(BIN)/couplings reproduce $(ARGS)

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going $(ARGS) docs docs/_build/html

stress: $(VENV)/.installed
	$(BIN)/python -m benchmarks.stress $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(VENV)/.installed-dev
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf $(VENV) dist build docs/_build docs/auto_gallery .pytest_cache .mypy_cache .ruff_cache .hypothesis

# ---- installation: stamps, so that it happens once and again when a requirement changes ----
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "couplings needs Python >= 3.10, and $(PYTHON) is not; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) -e ".[experiments,test]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e ".[experiments,test,dev]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e ".[docs]"
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) -e ".[bench]"
	@touch $@
