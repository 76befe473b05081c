# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
export OMP_WAIT_POLICY ?= PASSIVE
WORKERS ?= 2

PORTABLE := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 NUMBA_CPU_NAME=generic OMP_NUM_THREADS=1
NUMERIC := tests/kernels tests/quant tests/nn tests/model tests/budget tests/hf/test_merge.py tests/hf/test_grid_layer.py \
	tests/hf/test_start.py tests/hf/test_contract.py tests/test_calibrate.py tests/test_statistics.py tests/test_objectives.py

.PHONY: help install demo test test-deep test-portable check bench gpu fuzz kill architectures docs wheel clean

help:
	@echo "make install   a virtual environment in .venv, from pyproject.toml and constraints.txt"
	@echo "make demo      tune the embedded model by every method, compare, export, run in llama.cpp (about 6 minutes)"
	@echo "make test      lint, types and tests (under 20 minutes on two cores)"
	@echo "make test-deep  further variants of what make test checks: Triton's interpreter, a pretended card, all architectures (30 minutes)"
	@echo "make test-portable  what computes, as on processors with other instructions, and in one thread (25 minutes)"
	@echo "make check     lint and types alone"
	@echo "make bench     speed and memory, as ratios against named peers; JSON in benchmarks/results"
	@echo "make gpu       every Triton kernel and method checked, and timed where there is a GPU (8 minutes; needs no install)"
	@echo "make kill      every command killed at every file-system event, and given again"
	@echo "make fuzz      100,000 damaged inputs of every kind (15 minutes on two cores; CASES=.. for more)"
	@echo "make architectures  every architecture of transformers, tiny: quantized, walked, saved, merged (10 minutes)"
	@echo "make wheel     the package, built, installed where nothing else is, and put to work"
	@echo "make docs      the site in site/, and the tables of README and docs/ from what demo and bench found"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "quadapt needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo,serve]'
	touch $@

demo: install
	$(BIN)/quadapt demo --output report --overwrite

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet
	$(BIN)/lint-imports
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not deep"

test-deep: install
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal -m deep

# Numbers must be right on every processor: the numeric tests with the instructions of others, where they can be left out
# here, and with one thread (of torch, of MKL, and of our own kernels, which take as many as torch: kernels/threads.py).
test-portable: install
	@failed=; for setting in $(PORTABLE); do \
		echo "== $$setting"; \
		env $$setting $(BIN)/python -m pytest --quiet --numprocesses $(WORKERS) --dist worksteal -m "not slow" \
			--ignore tests/kernels/test_triton.py $(NUMERIC) || failed="$$failed $$setting"; \
	done; test -z "$$failed" || { echo "failed under:$$failed"; exit 1; }

bench: install
	$(BIN)/python -m benchmarks

# On a bare machine too: with torch, triton, transformers, peft, numba and scipy, this source is all that is needed.
gpu:
	@PYTHONPATH=src $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu

fuzz: install
	$(BIN)/python -m benchmarks.fuzz --cases $(or $(CASES),100000) --seed $(or $(SEED),1)

# Every file-system event of every command; MOST=20 takes so many of each, spread over them.
kill: install
	PYTHONPATH=src:. $(BIN)/python -m tests.kill --most $(or $(MOST),1000000) --moments $(or $(MOMENTS),100) --seed $(or $(SEED),0)

# Also a deep test; here what came of each goes to benchmarks/results, and from there to docs/architectures.md.
architectures: install
	PYTHONPATH=src:. $(BIN)/python -m tests.architectures $(TYPES)

# What only the site needs is installed when the site is built, so that nobody else waits for it.
$(VENV)/documents: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(VENV)/documents
	if [ -f report/report.json ]; then cp report/report.json benchmarks/results/demo.json; fi
	$(BIN)/python scripts/tables.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# As somebody gets it who installs the package: in an environment that holds nothing else.
wheel: install
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/empty
	build/wheel/empty/bin/python -m pip install --quiet --constraint constraints.txt build/wheel/*.whl
	cd build/wheel && empty/bin/python ../../scripts/smoke.py

clean:
	rm -rf $(VENV) report build site
