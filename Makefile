# Everything a person types here. `make` alone prints this list.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Two workers with one thread each: torch's own threads and xdist's processes do not multiply.
TESTFLAGS ?= -n 2
BENCH     ?= --shape tiny --context 4096 --batch 4 --vs transformers
THREADS   := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help venv demo test sanitize format lint bench docs clean

help: ## print this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | column -t -s '|' 2>/dev/null \
	  || grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST)

venv: $(STAMP) ## make or refresh .venv (done by itself for every other verb)

# torch goes first and by its exact release, so that no other package's range picks one. The native kernels are built by
# the installation.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP) ## watch a compressed cache answer from a long text, on the bundled model
	$(BIN)/kvfold demo

test: $(STAMP) ## run the tests (TESTFLAGS="-n 0 -k name" narrows them)
	$(THREADS) $(BIN)/python -m pytest $(TESTFLAGS)

# A build of its own beside the installed one. `-S` leaves out the import hook of the editable installation, so that
# Python finds this copy first and everything else in .venv. The sanitizers' runtime has to be there before Python is.
SANITIZED := build/sanitize/site
SANITIZE  := from kvfold.kernels.cpu import _native; import sys; sys.exit("$(SANITIZED)" not in _native.__file__)
PRELOAD    = $(foreach lib,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(lib)))

sanitize: $(STAMP) ## run the kernels' tests with address and undefined-behaviour sanitizers (GCC), in build/sanitize
	rm -rf build/sanitize
	$(BIN)/python -m pip install --quiet --no-deps --target $(SANITIZED) -C build-dir=build/sanitize/cmake \
	  -C cmake.define.KVFOLD_SANITIZE=ON -C cmake.build-type=RelWithDebInfo .
	packages=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	export PYTHONPATH="$(CURDIR)/$(SANITIZED):$$packages" LD_PRELOAD="$(PRELOAD)" $(THREADS); \
	export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1; \
	$(BIN)/python -S -c '$(SANITIZE)' && \
	  $(BIN)/python -S -m pytest -n 0 -p no:cacheprovider $(wildcard tests/test_native*.py) tests/retrieval/test_bounds.py tests/test_threads.py

format: $(STAMP) ## let ruff mend what it can: imports, order, layout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(STAMP) ## ruff, mypy --strict, and the import law
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## time decode steps, after a correctness gate; the result goes to benchmarks/results
	mkdir -p benchmarks/results
	$(BIN)/kvfold bench decode $(BENCH) --json benchmarks/results/decode.json

docs: $(STAMP) ## rewrite docs/models.md: which model families are covered, found by running them
	$(BIN)/python -m docs.make_models

clean: ## remove .venv, build products and caches
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info src/*.egg-info
	find src tests docs examples training -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
