# `make` prints the targets. Everything is installed into .venv; nothing outside this folder is changed.

PY ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# torch is named here too, at one exact version, so that no other requirement can pick a different build of it.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch==2.13.0
LOCKED := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs pairs-full bench-peers bench-plan clean

help: ## Print this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.run ## Train a small GPT twice, plainly and thriftily, and compare.
	$(BIN)/scrimp demo

test: $(VENV)/.dev ## Run the tests on two cores. More: make test ARGS="-k lion".
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev ## Check style, formatting and types.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(VENV)/.dev ## Fix style and formatting in place.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.docs ## Build the documentation into site/, to be read from there: site/index.html.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --clean

pairs-full: $(VENV)/.dev ## Test every pair of techniques instead of a fixed sample (slow).
	SCRIMP_PAIRS=full $(BIN)/python -m pytest tests/pairs $(ARGS)

bench-peers: $(VENV)/.run ## Compare with other libraries, side by side (installs them into ~/.cache/scrimp-bench).
	$(BIN)/python benchmarks/peers/run.py --workload A16k --rounds 5 --steps 5 $(ARGS)
	$(BIN)/python benchmarks/peers/run.py --workload gpt2-small --rounds 5 --steps 3 $(ARGS)

bench-plan: $(VENV)/.dev ## Plan and run a grid of recipes, and print how far apart they are (half an hour).
	$(BIN)/scrimp probe
	$(BIN)/python benchmarks/plan/run.py $(ARGS)

clean: ## Delete caches and builds; keeps .venv and runs/.
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps record what is installed, and are renewed when the requirements change.

$(BIN)/python:
	$(PY) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.run: $(LOCKED) | $(BIN)/python
	@echo "Installing scrimp into $(VENV)"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(LOCKED) | $(BIN)/python
	@echo "Installing scrimp and its development tools into $(VENV)"
	@$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.run $@

$(VENV)/.docs: $(LOCKED) | $(BIN)/python
	@echo "Installing scrimp and what builds its documentation into $(VENV)"
	@$(INSTALL) -e '.[docs]'
	@touch $(VENV)/.run $@
