# make demo: trains, prunes and shows.   make test: checks everything.   Both make their own environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=

.PHONY: help demo test lint types notebook clean

help:
	@echo "make demo      train LeNet-300-100 dense and pruned (ARGS='--data mnist' for MNIST, ARGS=--help for more)"
	@echo "make test      style, types, tests, notebook"
	@echo "make notebook  execute notebooks/quickstart.ipynb in place"
	@echo "make clean     remove the environment and what the demo wrote"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -m lightning_autoprune.demo $(ARGS)

test: lint types
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

notebook: $(VENV)/installed
	$(BIN)/jupytext --to notebook notebooks/quickstart.py
	$(BIN)/jupyter execute --inplace notebooks/quickstart.ipynb

clean:
	rm -rf $(VENV) demo-output
