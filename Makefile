# make demo: trains, prunes and shows.   make test: checks everything.   Both make their own environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=

.PHONY: help demo test lint types notebook docs clean

help:
	@echo "make demo      train LeNet-300-100 dense and pruned (ARGS='--data mnist' for MNIST, ARGS=--help for more)"
	@echo "make test      style, types, tests, notebooks"
	@echo "make notebook  execute notebooks/*.ipynb in place"
	@echo "make docs      build the documentation site in docs/_build/html"
	@echo "make clean     remove the environment and what the demo wrote"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/lightning-autoprune demo $(ARGS)

test: lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

notebook: $(VENV)/installed
	$(BIN)/jupytext --to notebook notebooks/*.py
	PYTHONWARNINGS=ignore:IProgress $(BIN)/jupyter execute --inplace notebooks/*.ipynb

docs: $(VENV)/installed
	$(BIN)/sphinx-build -W --keep-going --quiet docs docs/_build/html
	@echo "open docs/_build/html/index.html"

clean:
	rm -rf $(VENV) demo-output docs/_build
