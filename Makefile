# make demo      train the digits recipe and show its result
# make test      lint, type-check and test: what CI runs
# make test-recipes   train every recipe and hold it to its header; not part of make test
# make test-triton-3.6   the kernels' tests with the oldest torch and Triton, in .venv-triton-3.6 (a download of 3 GB)
# make launches  compile every launch of every layer for a GPU to its end; make test compiles the first stage
# make kernels   compile every Triton kernel for four GPUs and write docs/kernels.md
# Both create .venv on the first run and reuse it until pyproject.toml or constraints.txt changes.

PYTHON ?= python3
JOBS ?= 2
THREADS ?= 1
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
OLDEST := .venv-triton-3.6
KERNEL_TESTS := $(wildcard tests/test_triton*.py) tests/test_launch.py tests/test_launches.py tests/test_compile_targets.py \
	tests/test_batch_invariant.py

.PHONY: help install demo test lint types pytest test-recipes test-triton-3.6 launches kernels format clean

help:
	@sed -n 's/^# //p' Makefile

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[recipes,datasets,docs,dev]'
	touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/bp-torch fit --config recipes/configs/digits.yaml

test: lint types pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy sees the packages under the names that they are installed by, through links.
types: $(STAMP)
	rm -rf build/types
	mkdir -p build/types/bp_torch
	ln -s ../../../triton_kernels ../../../recipes $(addprefix ../../../,$(wildcard bp_torch/*)) build/types/bp_torch/
	ln -s ../../benchmarks build/types/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p bp_torch -p benchmarks

# One thread for each worker, unless THREADS says otherwise: the workers already fill the cores.
pytest: $(STAMP)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --contracts=docs/contracts.md

# Hours on two cores: each recipe is trained as its header says.
test-recipes: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m recipes

# Where a pin of constraints-triton-3.6.txt differs from one of constraints.txt, it takes its place.
$(OLDEST)/.installed: pyproject.toml constraints.txt constraints-triton-3.6.txt
	$(PYTHON) -m venv $(OLDEST)
	sed -n 's/^\(.*==\).*/^\1/p' constraints-triton-3.6.txt | grep -vf - constraints.txt | cat - constraints-triton-3.6.txt >$(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt -e '.[dev]'
	touch $@

test-triton-3.6: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(JOBS) --dist worksteal $(KERNEL_TESTS)

launches: $(STAMP)
	BP_TORCH_LAUNCHES=cubin OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/test_launches.py

# In the interpreter nothing would be compiled.
kernels: $(STAMP)
	mkdir -p build
	env -u TRITON_INTERPRET OMP_NUM_THREADS=1 $(BIN)/python tests/compile_targets.py docs/kernels.md >build/kernels.json

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
