PYTHON := .venv/bin/python
DEMO := build/demo

.PHONY: demo test test-fast lint bench bench-gpu chaos mutants setup

demo: setup  ## convert, pretrain, evaluate and tabulate the mini data set on this machine
	$(PYTHON) run_stage.py run mini --run-root $(DEMO)
	$(PYTHON) run_stage.py tables mini --run-root $(DEMO) --filled
	$(PYTHON) run_stage.py tables mini --run-root $(DEMO) --out $(DEMO)/tables
	$(PYTHON) run_stage.py report mini --run-root $(DEMO)

test: setup lint  ## everything, with a Slurm cluster of its own
	$(PYTHON) -m pytest -n 2 --dist loadgroup

test-fast: setup  ## without the slow tests and Slurm, on two cores
	$(PYTHON) -m pytest -n 2 --dist loadgroup -m "not slow and not slurm"

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: setup  ## ratios against the naive ways, into build/bench.csv; BENCHMARKS="loader knn" chooses some
	$(PYTHON) tests/benchmarks/run_all.py $(BENCHMARKS)

bench-gpu: setup  ## training steps on the GPU of this machine, under nine minutes
	$(PYTHON) tests/benchmarks/bench_gpu.py

chaos: setup  ## campaigns of faults at full size, into build/chaos.csv; CAMPAIGNS="2_ 4_" chooses some
	$(PYTHON) tests/faults/chaos.py $(CAMPAIGNS)

mutants: setup  ## break one place of the code at a time; SEED=1 COUNT=150: which tests notice, into build/mutants_1.txt
	$(PYTHON) tests/mutants/run.py $(or $(SEED),1) $(or $(COUNT),150)

setup:
	@bash .ci/setup.sh
