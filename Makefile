# The first use of any target makes .venv from the pinned requirements.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Sources are compiled when they are first imported: most never are.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile
# Most of what is unpacked: beside the rest.
LARGE := ^(torch|triton|nvidia|cuda)
export PYTHONUNBUFFERED := 1
# Some machines forbid it; every process of a test would compile the sources again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-fast test-network browser services style lint format bench clean help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/.ready: requirements.txt pyproject.toml
	@echo "setting up $(VENV) (one to three minutes and 7 GB)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -E '$(LARGE)' requirements.txt | $(PIP) -r /dev/stdin & \
	  grep -vE '$(LARGE)' requirements.txt | $(PIP) -r /dev/stdin && wait $$!
	$(PIP) --no-build-isolation -e .
	@touch $@

demo: $(VENV)/.ready ## the main job on embedded defaults: benchmark, shards, sweep, test, pictures
	@echo "starting; everything goes to demo/"
	MALLOC_ARENA_MAX=1 $(BIN)/python jobs/demo.py

test: style ## lint, types and every test but the jobs of test-network
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rsfE -n 3 --dist loadgroup --no-loadscope-reorder -m "not cluster"

test-fast: $(VENV)/.ready ## the tests that take less than ten seconds each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

test-network: $(VENV)/.ready ## jobs on a cluster of machines that share nothing, in namespaces of this one (needs root)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "network or cluster" -rs

browser: ## Chromium for the tests that look at pages (Debian's package; needs root), else they are skipped
	command -v chromium || (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null) \
	  || echo "no Chromium: the tests of MLflow's pages will be skipped"

services: ## PostgreSQL for the tests of back ends (Debian's package; needs root), else they are skipped
	ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 \
	  || (apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql >/dev/null) \
	  || echo "no PostgreSQL: the tests of that back end will be skipped"

style: $(VENV)/.ready ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: style ## ruff and mypy
	$(BIN)/mypy

format: $(VENV)/.ready ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready ## every measurement in benchmarks/
	$(BIN)/python benchmarks/ablation.py
	$(BIN)/python benchmarks/captioning.py accuracy
	$(BIN)/python benchmarks/captioning.py speed
	$(BIN)/python benchmarks/caption_retrieval.py
	$(BIN)/python benchmarks/prepare.py --ray 2 --s3
	$(BIN)/python benchmarks/loading.py
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/sweep.py overhead
	$(BIN)/python benchmarks/sweep.py asha
	$(BIN)/python benchmarks/sweep.py simulated
	$(BIN)/python benchmarks/sweep.py experts
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/tracking.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/footprint.py -- make demo

clean: ## remove what the demo and the runs wrote (not .venv)
	rm -rf demo runs data build dist
