# Settings are make variables: `make up PORT=9000 MAX_BATCH=8` is MLXPOOL_PORT and MLXPOOL_MAX_BATCH (see README.md).

# Variables of this file that are not settings.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
MLX_BUILDS := cpu cuda12 cuda13
MLX ?= $(or $(patsubst .venv/.installed-%,%,$(firstword $(wildcard $(MLX_BUILDS:%=.venv/.installed-%)))),cpu)
WORKERS ?= 1
ARGS ?=
URL ?= http://127.0.0.1:8080
KEY ?=
ONLY ?=

# Checked before anything is changed: pip only warns about an unknown extra, and would leave an environment without MLX.
ifneq ($(filter-out $(MLX_BUILDS),$(MLX))$(words $(MLX)),1)
$(error MLX is the build of MLX to install: cpu, cuda12 or cuda13, not '$(MLX)')
endif

given := $(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $(v))),$(v)))
$(foreach v,$(filter-out MLXPOOL_% PYTHON MLX WORKERS ARGS URL KEY ONLY SHELL,$(given)),$(eval export MLXPOOL_$(v) = $$($(v))))

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(MLX)

.DEFAULT_GOAL := help
.PHONY: help install up test test-all test-clients conformance check format

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Settings are make variables: make up MODEL=\"demo /path/to/model\" PORT=8080 WORKERS=2"
	@echo "On Linux with an NVIDIA GPU, once: make install MLX=cuda12 (or cuda13)"

install: $(STAMP) ## put everything into .venv

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "mlx-pool needs Python 3.11 or newer; name one with: make install PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into $(VENV); this takes a minute or two the first time."
	@# A fresh environment if another build of MLX is installed: they overwrite each other's library.
	@$(PYTHON) -m venv $(if $(filter-out $(STAMP),$(wildcard $(VENV)/.installed-*)),--clear) $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(MLX),dev]'
	@touch $@

up: install ## run Redis, the API and a worker until Ctrl-C
	@# exec: a shell in between would be killed by Ctrl-C, and make would report an error.
	@exec $(BIN)/python -m common.pool.up --workers="$(WORKERS)" --parent $$PPID

# Two processes, each running complete files: the tests of a file share servers, and more models than cores would only wait.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: install ## run all tests except the heavy ones, or a selection: make test ARGS=tests/unit
	@$(PYTEST) -m "not heavy" $(ARGS)

test-all: install ## run every test; only what make test leaves out: make test-all ARGS="-m heavy"
	@$(PYTEST) $(ARGS)

test-clients: install ## run unmodified clients of many kinds, which it installs into the cache folder
	@$(BIN)/python -m pytest tests/clients $(ARGS)

conformance: install ## check any OpenAI-compatible server: URL=... MODEL=... [KEY=...] [ONLY=stream]
	@$(BIN)/python -m tests.conformance --url "$(URL)" --model "$(or $(MODEL),demo)" --key "$(KEY)" --only "$(ONLY)" $(ARGS)

check: install ## lint, format, types, import rules, what we rely on in other libraries
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest --quiet tests/contract

format: install ## format the code and fix what ruff can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
