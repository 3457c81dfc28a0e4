# What each target does stands behind its ##. Everything runs in .venv, which `setup` makes and keeps in
# line with requirements.lock; PYTHON=/path/to/python3.12 makes it of another Python.
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast lint format setup lock clean
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
ARGS ?=

help: ## show this list
	@echo "make TARGET [ARGS=\"...\"] [PYTHON=/path/to/python3]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

quickstart: setup ## run the whole pipeline on a small real model, on this machine; ARGS go to `fpo run`
	@$(BIN)/fpo run quickstart $(ARGS)

# Two processes run tests: with more threads than cores they would wait for each other in loops.
test: setup ## run all tests; ARGS go to pytest
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: setup ## run the tests that take seconds; ARGS go to pytest
	@$(BIN)/python -m pytest -m "not slow" $(ARGS)

lint: setup ## check style, format, types and the import rule, as CI does
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/pyright
	@$(BIN)/lint-imports --no-logo

format: setup ## format the code and mend what ruff can mend by itself
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format --quiet .

setup: ## make .venv, or bring it in line with the lock; at once when there is nothing to do
	@scripts/run_python scripts/setup_env.py

lock: ## pin the newest versions within pyproject.toml's ranges into requirements.lock
	@PYTHONDONTWRITEBYTECODE=1 scripts/run_python scripts/lock.py

clean: ## remove .venv, build outputs and the repository's caches; stores and downloaded models stay
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name .git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
