# Each target sets up .venv on its own, from Python 3.11 or newer alone, and leaves it be when it is up to date.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup format check generated test demo clean

IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3; do \
	"$$python" -c '$(IS_NEW_ENOUGH)' >/dev/null 2>&1 && echo "$$python" && break; done)
BIN := .venv/bin
READY := .venv/ready

# A newer release of pyright is no reason to ask the network while checking.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

help:
	@echo "make setup    install everything into .venv, at the tested versions"
	@echo "make demo     train, build, serve and ask, in under five minutes"
	@echo "make test     every check, then every test: what CI runs"
	@echo "make check    the checks alone: format, lint, types, imports, generated code, protos"
	@echo "make format   format the code and apply the lint's safe fixes"
	@echo "make clean    remove caches and build outputs; runs/ and .venv stay"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Loopsway needs Python 3.11 or newer, and neither python3.11 nor python3 is one;" \
		"install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c '$(IS_NEW_ENOUGH)' || { echo "$(PYTHON) is not Python 3.11 or newer;" \
		"name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "setting up .venv; the first time takes some minutes"
	@"$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo
	@$(MAKE) --no-print-directory generated
	cd protos && ../$(BIN)/buf lint

# Committed code must be what the pinned compiler makes of the .proto files; a generated file that git does not hold,
# ignored or not, would be missing from a clone.
generated: $(READY)
	@echo "protos/generate.sh, then git diff"
	@PYTHON="$(CURDIR)/$(BIN)/python" protos/generate.sh
	@git diff --exit-code --stat -- protos || { echo "generated code differs from the .proto files;" \
		"look at the diff and commit what generate.sh made" >&2; exit 1; }
	@missing="$$(git ls-files --others -- 'protos/*_pb2*.py' 'protos/*_pb2*.pyi')"; test -z "$$missing" || { \
		echo "generated files that git does not hold; commit them:" >&2; echo "$$missing" >&2; exit 1; }

test: check
	@$(BIN)/python -m pytest

demo: $(READY)
	@$(BIN)/loopsway demo

clean:
	rm -rf dist tests/output .pytest_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache
	find indexer service protos clients tests -name __pycache__ -type d -prune -exec rm -rf {} +
