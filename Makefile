PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.demo-ready
GAME_READY := $(VENV)/.coinrun-ready
TORCH_VENV := .venv-torch
TORCH_READY := $(TORCH_VENV)/.ready
PRIVACY_VENV := .venv-privacy
PRIVACY_READY := $(PRIVACY_VENV)/.ready
OLDEST_VENV := .venv-oldest
NEWEST_VENV := .venv-newest
TFDS_VENV := .venv-tfds
TFDS_READY := $(TFDS_VENV)/.ready
MODELS_VENV := .venv-models
MODELS_READY := $(MODELS_VENV)/.ready

# A new virtual environment: folder, what pip is to install.
define new_venv
	@echo "Creating $(1)"
	@$(PYTHON) -m venv --clear $(1)
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2)
endef

# The library's tests: folder of the virtual environment.
define test_library
	@$(1)/bin/python -m pip check
	@$(1)/bin/python -m pip list --disable-pip-version-check | grep -E '^(jax|numpy|optax|flax) '
	$(1)/bin/python -m pytest -n 2 hardvary tests --ignore tests/experiments
endef

.DEFAULT_GOAL := help
.PHONY: help venv coinrun demo test test-oldest test-newest test-tfds fuzz lint format docs figures bench models clean

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 13

venv: $(READY)  ## Create .venv with the pinned packages.

$(DEMO_READY): requirements-demo.txt setup.cfg pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) not found: install Python 3.11 or run make PYTHON=/path/to/python"; \
	  exit 1; }
	@test ! -L $(VENV) || { \
	  echo "$(VENV) is a link: run make venv where it leads, which others may be using"; \
	  exit 1; }
	@echo "Creating $(VENV) (once; less than a minute)"
	@$(PYTHON) -m venv --clear $(VENV)
	@# Two at a time: pip unpacks one package after the other.
	@grep -v '^#' requirements-demo.txt | xargs -P 2 -n 20 $(PIP) --no-compile --no-deps
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(READY): requirements.txt $(DEMO_READY)
	@echo "Installing what tests and documentation need (once; a minute)"
	@$(PIP) -r requirements.txt
	@touch $@

coinrun: $(GAME_READY)  ## Install CoinRun into .venv (Linux, x86-64, Python 3.11).

$(GAME_READY): requirements-coinrun.txt $(READY)
	@$(PIP) --no-deps --only-binary procgen2 -r requirements-coinrun.txt || { \
	  echo "CoinRun is not installed: see pip's message above. Its package procgen2 has no"; \
	  echo "build for every platform; Linux on x86-64 with Python 3.11 is what was tried."; \
	  echo "Everything but experiments.coinrun works without it."; \
	  exit 1; }
	@$(RUN) -c "from experiments.coinrun.game import require_game; require_game()"
	@touch $@

demo: $(DEMO_READY)  ## Train with plain averaging and with the AND-mask; draw the figure.
	$(RUN) -m experiments.synthetic compare --fitted-epochs 20 --out runs/demo

test: lint  ## Lint, check types, run all tests.
	$(RUN) -m pytest -n 2 --dist worksteal

test-oldest:  ## Test the library with the oldest versions that it takes (Python 3.11).
	$(call new_venv,$(OLDEST_VENV),-r requirements-oldest.txt)
	@$(OLDEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --editable .
	$(call test_library,$(OLDEST_VENV))

test-newest:  ## Test it with the newest versions that PYTHON=... takes.
	$(call new_venv,$(NEWEST_VENV),--editable .[test])
	$(call test_library,$(NEWEST_VENV))

test-tfds: $(TFDS_READY)  ## Test how data are loaded with the real tensorflow-datasets.
	$(TFDS_VENV)/bin/python -m pytest -n 0 tests/experiments/test_vision_tfds.py

$(TFDS_READY): experiments/vision/requirements-tfds.txt requirements.txt
	$(call new_venv,$(TFDS_VENV),-r $<)
	@touch $@

PROGRAMS ?= 10000
SEED ?= 0
fuzz: $(READY)  ## Random programs, fused against stacked: PROGRAMS=10000 SEED=0 (hours).
	$(RUN) -m tests.fuzz --programs $(PROGRAMS) --seed $(SEED)

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
	$(RUN) -m experiments.benchmark loops
	$(RUN) -m experiments.benchmark epochs --torch-python $(TORCH_VENV)/bin/python
	$(RUN) -m experiments.benchmark profile

$(TORCH_READY): experiments/benchmark/requirements-torch.txt
	$(call new_venv,$(TORCH_VENV),-r $<)
	@touch $@

$(PRIVACY_READY): experiments/benchmark/requirements-privacy.txt requirements.txt
	$(call new_venv,$(PRIVACY_VENV),-r $<)
	@touch $@

models: $(MODELS_READY)  ## Compare other people's models, fused against stacked.
	$(MODELS_VENV)/bin/python -m tests.models --workers 2

$(MODELS_READY): tests/models/requirements-models.txt requirements.txt
	$(call new_venv,$(MODELS_VENV),--no-deps -r $<)
	@touch $@

clean:  ## Remove the virtual environments and caches, not runs/.
	rm -rf $(VENV) $(TORCH_VENV) $(PRIVACY_VENV) $(OLDEST_VENV) $(NEWEST_VENV) $(MODELS_VENV)
	rm -rf $(TFDS_VENV)
	rm -rf build docs/api .mypy_cache .pytest_cache .ruff_cache
