# make quickstart   install, then learn a small sequence and open its report
# make test         install, then the test suite
# make test-cluster a real Slurm, real ssh and pods on virtual machines; as root, takes minutes
# make check        linters, types, import order, spelling, file length
# make docs         the documentation as a site, in build/site; a dead link is an error
# make smollm2      fetch a real pretrained model of 135 M parameters into the cache
# make results      every method on real rows and a real model; resumable, takes hours
# make bench-methods
#                   what every method costs beside `sequential`; hours on a CPU, and a second call
#                   goes on where the first was cut off (BENCH='--help' lists options)
# make bench-forecast
#                   what `accrete plan` says beside what happens (FORECAST='--help')
# make bench-shapes every method on T5-large and LLaMA-3.2-1B, random weights, a few steps
#                   (SHAPES='--help')
#
# PYTHON=python3.12 picks the interpreter of a new .venv; TORCH=torch==2.13.0+cu130 the build of
# PyTorch, wherever pip is set up to find it.

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
BIN := .venv/bin
INSTALLED := .venv/.installed
SOURCES := pipeline eval launch tests

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-cluster check format docs smollm2 bench-methods bench-forecast bench-shapes results constraints

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

# The stamp makes a second call instant and free of the network.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "accrete needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# Without an NVIDIA driver, PyTorch goes in first and alone: a CPU build that pip can see ranks
	@# above the plain one, and nothing that follows replaces it.
	command -v nvidia-smi >/dev/null || $(BIN)/python -m pip install -q '$(TORCH)'
	$(BIN)/python -m pip install -q -c constraints.txt '$(TORCH)' -e '.[dev]'
	touch $@

install: $(INSTALLED)

quickstart: install
	$(BIN)/accrete run quickstart --run-dir runs/quickstart-$$(date +%Y%m%d-%H%M%S)

test: install
	$(BIN)/python -m pytest -n 2

test-cluster: install
	$(BIN)/python -m pytest -m cluster tests/cluster -p no:randomly

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	@long=$$(find $(SOURCES) -name '*.py' -exec wc -l {} + | awk '$$2 != "total" && $$1 > 400'); \
	  test -z "$$long" || { echo "files of more than 400 lines; divide them:"; echo "$$long"; exit 1; }

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

smollm2: install
	$(BIN)/python -m accrete.pipeline.models.fetch_smollm2

results: install
	$(BIN)/python tests/bench/results.py $(RESULTS)

# BENCH='--tiny' only proves that it runs.
bench-methods: install
	$(BIN)/python tests/bench/methods.py $(BENCH)

bench-forecast: install
	$(BIN)/python tests/bench/forecast.py $(FORECAST)

bench-shapes: install
	$(BIN)/python tests/bench/shapes.py $(SHAPES)

# Newest versions of everything, as pip resolves them in an empty environment.
constraints:
	rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install -q '$(TORCH)' && build/constraints/bin/python -m pip install -q '.[dev]'
	{ sed '/^[^#]/,$$d' constraints.txt; \
	  build/constraints/bin/python -m pip freeze --all --exclude accrete --exclude pip | sed 's/+cpu$$//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt
