PYTHON := .venv/bin/python
DEMO := build/demo

.DEFAULT_GOAL := help
.PHONY: help setup setup-tests demo test test-all test-fast test-lowest test-newest lint docs bench bench-gpu chaos mutants

help:  ## print this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup:  ## install what is missing: system packages (as root, with apt) and .venv
	@bash .ci/setup.sh

setup-tests:
	@bash .ci/setup.sh tests

demo: setup  ## convert, pretrain, evaluate and tabulate the mini data set on this machine
	$(PYTHON) run_stage.py run mini --run-root $(DEMO)
	$(PYTHON) run_stage.py tables mini --run-root $(DEMO) --filled
	$(PYTHON) run_stage.py tables mini --run-root $(DEMO) --out $(DEMO)/tables
	$(PYTHON) run_stage.py tables mini --run-root $(DEMO) --against results/published/mini --verdicts --margin 6
	$(PYTHON) run_stage.py report mini --run-root $(DEMO)
	$(PYTHON) run_stage.py bundle mini --run-root $(DEMO) --weights
	$(PYTHON) run_stage.py verify $(DEMO)/mini.bundle.zip --certificate

test: setup-tests lint  ## run lint, types and the tests, with a Slurm cluster of its own
	$(PYTHON) -m pytest -n 2 --dist loadgroup

test-all: setup-tests lint  ## run all tests, those that take minutes included
	$(PYTHON) -m pytest -n 2 --dist loadgroup -m ""

test-fast: setup  ## run the tests that are neither slow nor need Slurm
	$(PYTHON) -m pytest -n 2 --dist loadgroup -m "not slow and not slurm and not long"

test-lowest:  ## run the fast tests with the lowest supported versions, in build/lowest
test-newest:  ## run the fast tests with the newest versions there are, in build/newest
test-lowest: VERSIONS := -c constraints-lowest.txt
test-newest: VERSIONS := --upgrade --upgrade-strategy eager
test-lowest test-newest: test-%:
	[ -x build/$*/bin/python ] || $${MUGS_PYTHON:-python3} -m venv build/$*
	build/$*/bin/python -m pip install -q $(VERSIONS) -e '.[dev]'
	build/$*/bin/python -m pytest -n 2 --dist loadgroup -m "not slow and not slurm and not long"

lint: setup  ## check style, spelling and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m codespell_lib
	$(PYTHON) -m mypy

docs: setup  ## write the generated pages of docs/ again
	$(PYTHON) docs/generate.py

bench: setup  ## measure against the naive ways, into build/bench.csv; BENCHMARKS="loader knn" chooses
	$(PYTHON) tests/benchmarks/run_all.py $(BENCHMARKS)

# Without setup, so that it runs on a bare machine: torch, torchvision, timm and numba are enough.
bench-gpu:  ## measure training on the GPU of this machine in nine minutes, into build/bench_gpu.json
	if [ -x $(PYTHON) ]; then $(PYTHON) tests/benchmarks/bench_gpu.py; else python3 tests/benchmarks/bench_gpu.py; fi

chaos: setup  ## run the fault campaigns at full size, into build/chaos.csv; CAMPAIGNS="2_ 9_" IMAGES=100000
	MUGS_CHAOS_IMAGES=$(IMAGES) $(PYTHON) tests/faults/chaos.py $(CAMPAIGNS)

mutants: setup  ## break one place of the code at a time, into build/mutants_1.txt; SEED=1 COUNT=150
	$(PYTHON) tests/mutants/run.py $(or $(SEED),1) $(or $(COUNT),150)
