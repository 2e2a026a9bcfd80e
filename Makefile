PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
GAME_READY := $(VENV)/.coinrun-ready
TORCH_VENV := .venv-torch
TORCH_READY := $(TORCH_VENV)/.ready
PRIVACY_VENV := .venv-privacy
PRIVACY_READY := $(PRIVACY_VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help venv coinrun demo test lint format docs figures bench clean

help:  ## Show this list.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

venv: $(READY)  ## Create .venv with the pinned packages.

$(READY): requirements.txt setup.cfg pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) not found: install Python 3.11 or run make PYTHON=/path/to/python"; \
	  exit 1; }
	@test ! -L $(VENV) || { \
	  echo "$(VENV) is a link: run make venv where it leads, which others may be using"; \
	  exit 1; }
	@echo "Creating $(VENV) (once; a minute or two)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(RUN) -m pip install --quiet --disable-pip-version-check \
	  --no-deps --no-build-isolation --editable .
	@touch $@

coinrun: $(GAME_READY)  ## Install CoinRun into .venv (Linux, x86-64, Python 3.11).

$(GAME_READY): requirements-coinrun.txt $(READY)
	@$(RUN) -m pip install --quiet --disable-pip-version-check \
	  --no-deps --only-binary procgen2 -r requirements-coinrun.txt || { \
	  echo "CoinRun is not installed: see pip's message above. Its package procgen2 has no"; \
	  echo "build for every platform; Linux on x86-64 with Python 3.11 is what was tried."; \
	  echo "Everything but experiments.coinrun works without it."; \
	  exit 1; }
	@$(RUN) -c "from experiments.coinrun.game import require_game; require_game()"
	@touch $@

demo: $(READY)  ## Train with plain averaging and with the AND-mask; draw the figure.
	$(RUN) -m experiments.synthetic compare --out runs/demo

test: lint  ## Lint, check types, run all tests.
	$(RUN) -m pytest -n 2

lint: $(READY)  ## Ruff (lint and format) and mypy.
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(READY)  ## Let ruff fix and format.
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

docs: $(READY)  ## Build the documentation, build/docs/index.html; a warning is an error.
	rm -rf docs/api build/docs build/doctrees
	$(RUN) -m sphinx --fail-on-warning --keep-going --quiet -d build/doctrees docs build/docs

figures: $(READY)  ## Draw the figures of the tutorial.
	$(RUN) -m docs.make_figures

bench: $(READY) $(TORCH_READY) $(PRIVACY_READY)  ## Time steps and epochs beside other systems, and growth.
	$(RUN) -m experiments.benchmark steps --torch-python $(TORCH_VENV)/bin/python
	$(RUN) -m experiments.benchmark gramian --growth \
	  --torch-python $(TORCH_VENV)/bin/python --privacy-python $(PRIVACY_VENV)/bin/python
	$(RUN) -m experiments.benchmark growth
	$(RUN) -m experiments.benchmark epochs --torch-python $(TORCH_VENV)/bin/python

$(TORCH_READY): experiments/benchmark/requirements-torch.txt
	@echo "Creating $(TORCH_VENV) for the PyTorch peers"
	@$(PYTHON) -m venv --clear $(TORCH_VENV)
	@$(TORCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(PRIVACY_READY): experiments/benchmark/requirements-privacy.txt requirements.txt
	@echo "Creating $(PRIVACY_VENV) for JAX Privacy"
	@$(PYTHON) -m venv --clear $(PRIVACY_VENV)
	@$(PRIVACY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

clean:  ## Remove the virtual environments and caches, not runs/.
	rm -rf $(VENV) $(TORCH_VENV) $(PRIVACY_VENV) build docs/api .mypy_cache .pytest_cache .ruff_cache
