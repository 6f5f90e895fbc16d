# `make` alone prints help. Every other target sets up .venv first when that is needed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
HOST_TESTS := tests/launch/test_two_hosts.py tests/faults/test_restarts.py

# make demo OUT=..., make cifar10 SOURCE=... EPOCHS=... TRAIN_PER_CLASS=... OUT=...
OUT ?=
SOURCE ?=
EPOCHS ?=
TRAIN_PER_CLASS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo cifar10 test test-hosts test-slow fuzz lint format engines bench clean

help: ## print this
	@echo "usage: make TARGET    (PYTHON=$(PYTHON) makes $(VENV))"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the exact versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "make: '$(PYTHON)' is missing or older than Python 3.11; name another one: make setup PYTHON=python3.12" >&2; exit 2; }
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@echo "Installing into $(VENV): a few minutes, about 6 GB the first time"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## render images, pretrain, evaluate; at most 10 minutes on two cores (OUT=runs/demo)
	$(BIN)/python -m moco_scale demo --output-dir '$(or $(OUT),runs/demo)'

cifar10: $(STAMP) ## the same on CIFAR-10: SOURCE=folder or tar, EPOCHS=N, TRAIN_PER_CLASS=N, OUT=runs/cifar10
	$(BIN)/python -m moco_scale cifar10 --output-dir '$(or $(OUT),runs/cifar10)' \
	    $(if $(SOURCE),--source '$(SOURCE)') $(if $(EPOCHS),--epochs $(EPOCHS)) \
	    $(if $(TRAIN_PER_CLASS),--train-per-class $(TRAIN_PER_CLASS))

test: $(STAMP) ## all tests but the slow ones; 15 to 20 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-hosts: $(STAMP) ## runs across two hosts (network namespaces, so root): launchers, lost hosts, restarts
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(HOST_TESTS) $(PYTEST_ARGS)

test-slow: $(STAMP) ## the tests that take minutes each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --timeout 3600 $(PYTEST_ARGS)

fuzz: $(STAMP) ## every parser of foreign files, an hour each (SECONDS=3600)
	@set -e; for name in $$($(BIN)/python tests/fuzz/fuzzing.py --list); do \
	    $(BIN)/python tests/fuzz/fuzzing.py $$name --seconds $(or $(SECONDS),3600); done

lint: $(STAMP) ## ruff and mypy, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP) ## let ruff put the layout and the imports right
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

engines: $(STAMP) ## every engine and precision against fp32 DDP, every handover: two tables
	OMP_NUM_THREADS=1 $(BIN)/python scripts/engines.py

bench: $(STAMP) ## every benchmark in its quick form
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file --quick; done

clean: ## remove caches and build leftovers; keeps .venv, runs and data
	rm -rf build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
