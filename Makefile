# Each target does its own set-up: on a fresh clone `make demo` or `make test` is the first command.
#
# There is one environment, with everything in it, though the demo alone needs less: the versions
# in constraints.txt were tested together, and the second command has nothing left to install.

PYTHON ?= python3
# An index for pip to look at besides its own. PyPI's torch for Linux is the CUDA build;
# TORCH_INDEX=https://download.pytorch.org/whl/cpu gives the smaller CPU build.
TORCH_INDEX ?=
DEMO_ARGS ?=
# Two processes, each with one torch thread (tests/conftest.py), fill two cores.
TEST_ARGS ?= -n 2

BIN := .venv/bin
READY := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help demo test check docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train a small model, attribute it, check it against retraining; runs/demo/"
	@echo "make test    the test suite"
	@echo "make check   ruff, pyright, import-linter"
	@echo "make docs    documentation in docs/_build/html"
	@echo "make clean   remove caches and built files; .venv and runs/ stay"

demo: $(READY)
	$(BIN)/forebear demo $(DEMO_ARGS)

# --verbosity=0 undoes the -q of pyproject.toml: a full summary is wanted here.
test: $(READY)
	$(BIN)/python -m pytest --verbosity=0 $(TEST_ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/sphinx-build -W -n --keep-going -b html docs docs/_build/html

clean:
	rm -rf build dist docs/_build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp comes last, so an interrupted set-up is finished by the next command.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "forebear needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." >&2; \
	  echo "Name another: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { \
	  echo "No virtual environment could be made; on Debian: apt install python3-venv" >&2; exit 1; }
	@echo "Installing into .venv; the first time this takes a few minutes."
	$(BIN)/python -m pip install $(if $(CI),--quiet) \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e '.[dev]'
	@touch $@
