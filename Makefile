# Everything sets itself up in .venv from a bare clone: Python 3.11 or newer and make are enough.
PYTHON ?= python3
PROMPT ?= an orange triangle below a cyan circle
SEED ?= 2
IMAGE ?= image.png
BENCH ?= --case demo --device cpu --batch 1,2 --rounds 7 --builders 2 --patience 300 \
  --profile diffusers --profile latentrt-onnxruntime
VENV := .venv
BIN := $(VENV)/bin
EXTRA := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
OTHER := $(if $(filter cpu,$(EXTRA)),onnxruntime-gpu,onnxruntime)
RUNTIME := $(VENV)/.runtime-$(EXTRA)
TEST := $(VENV)/.test-$(EXTRA)
CONSTRAINTS := $(if $(filter cpu,$(EXTRA)),-c constraints.txt)
PYTEST := $(BIN)/python -m pytest

# As they were typed: a prompt's `$` is not make's.
override PROMPT := $(value PROMPT)
override SEED := $(value SEED)
override IMAGE := $(value IMAGE)
export PROMPT SEED IMAGE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help generate bench test test-full gpu check format clean

help:
	@echo 'make generate [PROMPT="..."] [SEED=2] [IMAGE=image.png]   a picture from the shipped demo model'
	@echo 'make bench       the demo on the CPU: speed, memory and quality beside diffusers into out/bench, under ten minutes'
	@echo 'make test        the tests, a few minutes'
	@echo 'make test-full [PARTS="..."]   the slow ones as well, hours: every sampler, demo quality, full-size engines'
	@echo 'make gpu [PARTS="..."]         what needs a CUDA GPU: tests, kernels, the benchmark at full size'
	@echo 'make check       ruff and mypy'
	@echo 'make clean       remove what these made'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "latentrt needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Of onnxruntime and onnxruntime-gpu, which share a folder, one only: where a GPU has come or gone the other goes first.
define change_extra
	@rm -f $(filter-out %-$(EXTRA),$(wildcard $(VENV)/.runtime-* $(VENV)/.test-*))
	@$(BIN)/python -m pip uninstall -qq --yes $(OTHER)
endef

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	$(change_extra)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[$(EXTRA)]'
	@touch $@

$(TEST): pyproject.toml constraints.txt | $(BIN)/python
	$(change_extra)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[$(EXTRA),test]'
	@mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/latentrt  # the name mypy knows the root by
	@touch $(RUNTIME) $@

$(VENV)/.ray: $(TEST)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[ray]'
	@touch $@

generate: $(RUNTIME)
	@$(BIN)/latentrt generate --seed "$$SEED" -o "$$IMAGE" -- "$$PROMPT"

bench: $(TEST)
	$(BIN)/latentrt bench $(BENCH)

test: $(TEST)
	OMP_NUM_THREADS=1 $(PYTEST) -m 'not full' -n 2

# Goes on where it was stopped: what passed with the sources as they are is not run again.
test-full: $(VENV)/.ray
	$(BIN)/python -m latentrt.bench.full $(PARTS)

# Part after part, what is worth most first; one that fails does not end it, and what passed is not run again.
# Results are written to bench/results as they come.
gpu: $(TEST)
	$(BIN)/python -m latentrt.bench.gpu $(PARTS)

check: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/src $(BIN)/mypy

format: $(TEST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build latentrt.egg-info .pytest_cache .mypy_cache .ruff_cache image.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
