# Everything sets itself up in .venv from a bare clone: Python 3.11 or newer and make are enough.
PYTHON ?= python3
PROMPT ?= an orange triangle below a cyan circle
SEED ?= 2
IMAGE ?= image.png
BENCH ?= --batch 1,2 --rounds 7 --patience 200 --profile
VENV := .venv
BIN := $(VENV)/bin
EXTRA := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
CONSTRAINTS := $(if $(filter cpu,$(EXTRA)),-c constraints.txt)
PYTEST := $(BIN)/python -m pytest

# As they were typed: a prompt's `$` is not make's.
override PROMPT := $(value PROMPT)
override SEED := $(value SEED)
override IMAGE := $(value IMAGE)
export PROMPT SEED IMAGE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help generate bench test test-full gpu gpu-tests gpu-kernels gpu-bench gpu-timeline check format clean

help:
	@echo 'make generate [PROMPT="..."] [SEED=2] [IMAGE=image.png]   a picture from the shipped demo model'
	@echo 'make bench       speed, memory and quality beside diffusers into out/bench, under ten minutes'
	@echo 'make test        the tests, a few minutes'
	@echo 'make test-full [PARTS="..."]   the slow ones as well, hours: every sampler, demo quality, full-size engines'
	@echo 'make gpu         what needs a CUDA GPU'
	@echo 'make check       ruff and mypy'
	@echo 'make clean       remove what these made'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "latentrt needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[$(EXTRA)]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[$(EXTRA),test]'
	@mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/latentrt  # the name mypy knows the root by
	@touch $(VENV)/.runtime $@

$(VENV)/.ray: $(VENV)/.test
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[ray]'
	@touch $@

generate: $(VENV)/.runtime
	@$(BIN)/latentrt generate --seed "$$SEED" -o "$$IMAGE" -- "$$PROMPT"

bench: $(VENV)/.test
	$(BIN)/latentrt bench $(BENCH)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(PYTEST) -m 'not full' -n 2

# Goes on where it was stopped: what passed with the sources as they are is not run again.
test-full: $(VENV)/.ray
	$(BIN)/python -m latentrt.bench.full $(PARTS)

# Each part goes on where it was stopped, or is short; results are written to bench/results as they come.
gpu: gpu-tests gpu-kernels gpu-bench gpu-timeline

gpu-tests: $(VENV)/.test
	$(PYTEST) -m gpu

gpu-kernels: $(VENV)/.test
	$(BIN)/latentrt kernels --measure
	$(BIN)/latentrt kernels --tune
	$(BIN)/latentrt kernels --measure  # by the new block sizes

gpu-bench: $(VENV)/.test
	$(BIN)/latentrt bench --case sdxl --batch 1 --out bench/results/gpu-sdxl
	$(BIN)/latentrt bench --case sdxl-refiner --batch 1 --out bench/results/gpu-sdxl-refiner

gpu-timeline: $(VENV)/.test
	$(BIN)/python -m latentrt.bench.timeline --case sdxl-refiner --out bench/results/gpu-timeline

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/src $(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build latentrt.egg-info .pytest_cache .mypy_cache .ruff_cache image.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
