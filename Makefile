# `make demo` and `make test` do all of their own set-up on a fresh machine.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13; do $$p -c "" 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# DeepSpeed and Ray workers find ninja and the interpreter here; the suite shares two cores.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DS_BUILD_OPS := 0
# Of `make fuzz`.
CASES ?= 20000
FIRST ?= 0
KIND ?=

.PHONY: help setup demo test test-slow test-gpu fuzz chaos lint format bench clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## Make .venv and install everything

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup ## Train the baseline and LarvSeg on generated scenes: Ray, two DeepSpeed workers, MLflow
	$(BIN)/python jobs/demo.py

test: setup lint ## Lint, types, layers, and the default test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup ## What takes minutes: the full-vocabulary step, job submission, every job's --smoke
	$(BIN)/python -m pytest -m slow

test-gpu: setup ## The checks that need a CUDA device
	$(BIN)/python -m pytest -m gpu

fuzz: setup ## Damage CASES files of all kinds (or of one KIND, from the seed FIRST on) and read them
	PYTHONPATH=.:tests $(BIN)/python -m fuzz --cases $(CASES) --first $(FIRST) --kind "$(KIND)"

chaos: setup ## Kill a run 30 times, locally and on Ray, and compare it with one that nobody disturbed
	PYTHONPATH=.:tests $(BIN)/python -m chaos

lint: setup ## ruff, import-linter, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: setup ## Rewrite the code as the linter wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## Time and bytes of the banks, of k-means, of the weak losses and of MCIBI's parts
	$(BIN)/python benchmarks/bank.py
	$(BIN)/python benchmarks/contrast.py
	$(BIN)/python benchmarks/kmeans.py --minutes 2
	$(BIN)/python benchmarks/feature_memory.py
	$(BIN)/python benchmarks/complexity.py --size 32
	$(BIN)/python benchmarks/weak_loss.py

clean: ## Remove what the demo and the tests made (not .venv)
	rm -rf runs data .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
