# kronlab: `make help` lists what can be done. Every target but help makes sure of the environment first (make setup).
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.stamp

# What to make the environment with: the first of these that is 3.11 or newer and can make one. PYTHON=... overrides.
PYTHON      ?=
# An index with the wanted build of torch; empty: whatever pip's own settings find (see requirements.lock).
TORCH_INDEX ?=
# Tests run in this many processes of one thread each.
WORKERS     ?= 2

# Settings of the table targets; empty ones are left to the configuration.
SCALE       ?=
RESULTS_DIR ?=
DRY_RUN     ?=
FORCE       ?=
# Settings of `plan`.
MODEL       ?= llama2_7b
METHOD      ?= cdka
FORMAT      ?=
# More arguments as they are: Hydra overrides of the script (for tables those of configs/tables.yaml, for example
# ARGS="render_only=true" or ARGS="results.reuse=any"), or pytest's for `make test`.
ARGS        ?=

on = $(filter 1 true yes,$(1))
TABLE_ARGS = $(if $(SCALE),table_scale=$(SCALE)) $(if $(RESULTS_DIR),results.dir='$(RESULTS_DIR)') \
  $(if $(call on,$(DRY_RUN)),dry_run=true) $(if $(call on,$(FORCE)),force=true) $(ARGS)

TABLES        := $(patsubst configs/table/table%.yaml,%,$(wildcard configs/table/table*.yaml))
TABLE_TARGETS := $(addprefix reproduce-table,$(TABLES))

.PHONY: help setup lint format test faults plan smoke status claims dashboard wandb-push $(TABLE_TARGETS)

help: ## list every target
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile
	@for n in $$(printf '%s\n' $(TABLES) | sort -n); do \
	  printf '  make %-18s %s\n' reproduce-table$$n "$$(sed -n '1s/^# *//p' configs/table/table$$n.yaml)"; done
	@echo
	@echo '  tables:  SCALE=smoke|mini|small|paper (empty: chosen by the machine)  DRY_RUN=1  FORCE=1  RESULTS_DIR=dir'
	@echo '  plan:    MODEL=name  METHOD=name  FORMAT=json'
	@echo '  all:     ARGS="more arguments"  PYTHON=path  TORCH_INDEX=url'

setup: $(STAMP) ## make .venv with the locked packages and kronlab itself (does nothing when up to date)

# Safe to interrupt at any point and to type again: pip skips what is installed. A package cut off in the middle has
# no INSTALLER file yet, and its metadata is dropped so that pip does not take it for installed.
$(STAMP): requirements.lock requirements-data.lock pyproject.toml
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  python=; \
	  for p in $(or $(PYTHON),python3.11 python3); do \
	    if "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$p; break; fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "setup: no Python >= 3.11 with the venv module among: $(or $(PYTHON),python3.11 python3); install one (Debian: python3.11-venv) or pass PYTHON=/path/to/python3.11" >&2; exit 1; \
	  fi; \
	  echo "setup: making $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv $(VENV); \
	fi
	@if ! $(PY) -c 'import pycosat' 2>/dev/null; then \
	  command -v cc >/dev/null && $(PY) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' \
	  || { echo "setup: reasoning-gym needs pycosat, which is compiled: install a C compiler and Python's headers (Debian: gcc python3.11-dev) and type make again" >&2; exit 1; }; \
	fi
	@find $(VENV)/lib -maxdepth 3 -type d -name '*.dist-info' '!' -exec test -s '{}/INSTALLER' ';' -prune -exec rm -rf '{}' +
	@echo "setup: installing the locked packages (minutes the first time)"
	@$(if $(TORCH_INDEX),$(PY) -m pip install -q --disable-pip-version-check --no-deps --index-url '$(TORCH_INDEX)' "$$(grep '^torch==' requirements.lock)")
	@$(PY) -m pip install -q --disable-pip-version-check -r requirements.lock
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps -r requirements-data.lock
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
	@echo "setup: done"

lint: $(STAMP) ## ruff (lint and format) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP) ## put the code into ruff's format, with the fixes that are safe
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

test: $(STAMP) ## the tests (ARGS="-k name" for some of them, WORKERS=n for more processes; ARGS="-m slow" for those of many processes)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist loadfile --durations=30 -m "not slow" $(ARGS)

faults: $(STAMP) ## break sweeps in every known way and see that nothing is lost (ARGS="--kills 500", ARGS=--quick)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) tests/faults/campaign.py $(ARGS)

plan: $(STAMP) ## count parameters, bytes and memory before training; no weights needed
	@$(PY) scripts/plan.py model=$(MODEL) method=$(METHOD) $(if $(FORMAT),format=$(FORMAT)) $(ARGS)

smoke: $(STAMP) ## every table once with random tiny models, into outputs/smoke
	@set -e; for n in $(TABLES); do \
	  $(PY) scripts/tables.py table=table$$n table_scale=smoke results.dir='$(or $(RESULTS_DIR),outputs/smoke)' $(ARGS); done

status: $(STAMP) ## cells by state, with an estimate of what is left (ARGS="table=table2 table_scale=small" for a table's, format=json)
	@$(PY) scripts/status.py $(if $(RESULTS_DIR),results.dir='$(RESULTS_DIR)') $(ARGS)

claims: $(STAMP) ## what the records say of the papers' claims, into results/claims.{md,csv,json}; runs nothing
	@$(PY) scripts/claims.py $(if $(RESULTS_DIR),results.dir='$(RESULTS_DIR)') $(ARGS)

dashboard: $(STAMP) ## every table, figure, claim and record on one page, into results/dashboard.html; runs nothing
	@$(PY) scripts/dashboard.py $(if $(RESULTS_DIR),results.dir='$(RESULTS_DIR)') $(ARGS)

wandb-push: $(STAMP) ## the records as W&B runs (ARGS="mode=online only.table=table2 dashboard=true"; offline by default)
	@$(PY) scripts/wandb_push.py $(if $(RESULTS_DIR),results.dir='$(RESULTS_DIR)') $(ARGS)

# One target for each configs/table/tableN.yaml; help takes its line from the file's first comment.
$(TABLE_TARGETS): reproduce-table%: $(STAMP)
	@$(PY) scripts/tables.py table=table$* $(strip $(TABLE_ARGS))

reproduce-table%:
	@echo "reproduce-table$*: there is no configs/table/table$*.yaml; make help lists the tables there are" >&2; exit 2
