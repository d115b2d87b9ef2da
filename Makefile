# `make demo` and `make test` first install what they need into $(VENV). The demo needs less, so `make demo` is quicker.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: help demo test lint types notebook docs clean

help:
	@echo "make demo      train LeNet-300-100 dense and pruned (ARGS='--data mnist' for MNIST, ARGS=--help for more)"
	@echo "make test      check style and types, run the tests and the notebooks"
	@echo "make notebook  execute notebooks/*.ipynb in place"
	@echo "make docs      build the documentation site in docs/_build/html"
	@echo "make clean     remove the environment and everything that the demo wrote"

$(VENV)/demo-installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) ".[demo]"
	touch $@

$(VENV)/dev-installed: $(VENV)/demo-installed
	$(INSTALL) ".[dev]"
	touch $@

demo: $(VENV)/demo-installed
	$(BIN)/lightning-autoprune demo $(ARGS)

test: lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev-installed
	$(BIN)/mypy

notebook: $(VENV)/dev-installed
	$(BIN)/jupytext --to notebook notebooks/*.py
	PYTHONWARNINGS=ignore:IProgress $(BIN)/jupyter execute --inplace notebooks/*.ipynb

docs: $(VENV)/dev-installed
	$(BIN)/sphinx-build -W --keep-going --quiet docs docs/_build/html
	@echo "open docs/_build/html/index.html"

clean:
	rm -rf $(VENV) demo-output docs/_build
