# Two commands for a newcomer: `make demo` and `make test`. Everything installs into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONUNBUFFERED := 1
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow gpu-test gpu-all netlab check install clean

demo: $(VENV)/.runtime
	$(BIN)/eptwin demo --out run/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow" --timeout 900

gpu-test: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu tests/runtime -rs

# Everything that a GPU machine has to measure; goes on where it stopped. GPU_BUDGET: seconds.
GPU_BUDGET ?= 1500
gpu-all: $(VENV)/.dev
	$(BIN)/python -m benchmarks.gpu_all --budget $(GPU_BUDGET)

netlab: $(VENV)/.runtime
	$(BIN)/python -m benchmarks.netlab

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/.runtime

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# numpy comes first: torch warns when it is absent.
$(VENV)/.runtime: $(VENV)/bin/python setup.cfg
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[runtime]'
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet -e '.[runtime,dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info run
