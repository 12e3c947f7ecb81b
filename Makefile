# make quickstart: the whole method on real images, and a report.  make test: everything that must hold.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/quickstart

.PHONY: quickstart test lint bench clean
.DELETE_ON_ERROR:

# One environment for users, tests and benchmarks; made again when the project's requirements change.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test,bench]"
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/gif quickstart --output $(RUN_DIR)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

bench: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

clean:
	rm -rf $(VENV) runs
