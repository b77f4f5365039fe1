# Two commands on a fresh machine: `make train` and `make test`. Each sets up its own environment in .venv.
# `make gpu`, on a machine with a GPU, uses the Python it is given (PYTHON=...) and installs nothing.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := constraints-$(if $(shell nvidia-smi -L 2>/dev/null),nvidia,cpu).txt

.PHONY: train test test-oldest soak check census gpu release clean

train: .venv/.installed  ## train the quickstart, sample from it and draw what it learned
	$(BIN)/python -m lion_triton.train quickstart

test: .venv/.installed-test check  ## lint, types, and the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-oldest: .venv-oldest/.installed-test  ## the suite with the oldest PyTorch, Triton and NumPy that are supported
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist worksteal

soak: .venv/.installed-test  ## damaged files, random arguments of the public functions, runs killed at random: counts
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.hostile_files --count 1000
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.properties --cases 10000
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.kills --count 500

check: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

census: .venv/.installed  ## registers, spills and shared memory of every kernel on four GPUs, without one
	$(BIN)/python -m lion_triton.kernels.census --check

gpu:  ## all tests, the benchmarks, a real run and the census on this machine's GPU, in eight minutes
	$(PYTHON) bench/gpu.py

release: build/environment/bin/python  ## the wheel, its size, and what it does in an environment where there is nothing else
	rm -rf build/wheel build/lib build/chairs
	$< -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	@du -k build/wheel/*.whl | awk '{printf "%s: %.1f MB\n", $$2, $$1 / 1024}'
	$< -m pip install --quiet --force-reinstall --no-deps build/wheel/*.whl
	$< -m pip install --quiet --constraint $(CONSTRAINTS) build/wheel/*.whl
	cd build && bash -c 'time environment/bin/python -m lion_triton.sample furniture --class chair --out chairs'

# Debian's python3 may come without venv: then pip brings virtualenv, into this folder alone.
%/bin/python:
	$(PYTHON) -m venv $* || { rm -rf $*; \
	  $(PYTHON) -m pip install --quiet --target .venv-tools virtualenv && \
	  PYTHONPATH=.venv-tools $(PYTHON) -m virtualenv --quiet $*; }

.venv/.installed: pyproject.toml constraints.txt $(CONSTRAINTS) | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable .
	touch $@

.venv/.installed-test: pyproject.toml constraints.txt $(CONSTRAINTS) | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	touch .venv/.installed $@

.venv-oldest/.installed-test: pyproject.toml constraints-oldest.txt | .venv-oldest/bin/python
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-tools build *.egg-info .mypy_cache .ruff_cache .pytest_cache
