# Each target alone sets up what it needs; where that is done already, it costs nothing.
#   make demo ARGS="--help"     arguments for the command behind a target
#   make setup BACKEND=cpu      cpu or gpu instead of what the machine has

SHELL := /bin/bash
ARGS ?=
TEST_TIMEOUT_S ?= 3600
# Two lanes, one for vLLM and one for the rest (tests/conftest.py); each keeps a core busy. JOBS=0: in series.
JOBS ?= 2
PYTEST = timeout --foreground --kill-after=60 $(TEST_TIMEOUT_S) $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup
CRASH_STATES := 2000
BIN := .venv/bin
# Else each process compiles torch, transformers and vLLM from source anew: half of its start.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-night test test-slow test-all check lock docs pictures bench clean

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

setup:  ## install everything into .venv
	@python3 tools/setup.py $(if $(BACKEND),--backend $(BACKEND)) $(if $(filter setup,$(MAKECMDGOALS)),--again)

demo: setup  ## serve a small model, teach it something while it answers, show that it learned
	@$(BIN)/apollo-ipc demo $(ARGS)

demo-night: setup  ## a whole night: a day's logs flagged, stripped, dreamt of, trained, watched, reported
	@$(BIN)/python -m apollo_curation.demo.night $(ARGS)

test: setup  ## run the tests, without the slow ones
	@$(PYTEST) -m "not slow" $(ARGS)

test-slow: setup  ## run only what `make test` leaves out
	@$(PYTEST) -m slow $(ARGS)

test-all: setup  ## run all tests, 2000 crash states of each protocol among them
	@$(PYTEST) --crash-states $(CRASH_STATES) $(ARGS)

check: setup  ## lint, formatting, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

lock: setup  ## resolve the versions in locks/ anew
	@python3 tools/setup.py --lock

docs: setup  ## the documentation as a site, in build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "made: build/site/index.html, or $(BIN)/mkdocs serve"

pictures: setup  ## make the documentation's pictures anew, on a real server
	@$(BIN)/python benchmarks/pictures.py $(ARGS)

bench:  ## list the benchmarks
	@for script in benchmarks/*.py; do \
	  [ -e "$$script" ] || continue; \
	  printf '  %-36s %s\n' "$$script" "$$(sed -n '/"""/{s/^[^"]*"""//;s/"""$$//;p;q}' "$$script")"; \
	done

clean:  ## remove .venv, caches and the demo's output
	rm -rf .venv .pytest_cache .ruff_cache demo-out build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
