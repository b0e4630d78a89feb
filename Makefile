# make quickstart   the main job: from nothing to runs/quickstart/report.html
# make test         the tests that take seconds each; make test-full: the others too; make lint: style and the test of the house
# make sglang       .venv-sglang: an SGLang server for engine=sglang on a CPU, with packages of its own; the tests have one too
#
# All of them make .venv first when it is missing. Two variables choose what goes into it:
#
#   PYTHON   the interpreter, 3.11 or 3.12; by default the first of the two that runs
#   TORCH    where torch comes from, as arguments of pip install. The default is the build that pip finds first, which on Linux is
#            a CUDA build of several GB. Without a GPU, take the CPU build: copy the address of PyTorch's CPU wheel index from
#            PyTorch's own installation page and pass it with pip's option for an index,
#                make quickstart TORCH="torch==2.13.0 --index-url ADDRESS"
#            Any torch from 2.11 on works (a wheel file's path too). It is installed first and what follows leaves it alone.

# PROCESSES is how many processes the quickstart starts: on a CPU 1, 2, 4 or 8, one thread each. `make quickstart device=cuda` runs it
# on one GPU in bf16, into runs/quickstart_cuda. `seed=2` takes another seed, into runs/quickstart_seed2.

TORCH ?= torch==2.13.0
PROCESSES ?= 2
PYTHON ?= $(shell for python in python3.11 python3.12; do if $$python -c "" 2>/dev/null; then echo $$python; break; fi; done)
NAME := quickstart$(if $(device),_$(device))$(if $(seed),_seed$(seed))
CHOICES := $(if $(device),device=$(device)) $(if $(filter cuda,$(device)),precision=bf16) $(if $(seed),seed=$(seed))
VENV := .venv
BIN := $(VENV)/bin
SGLANG := .venv-sglang

.PHONY: .venv sglang quickstart test test-full lint clean

.venv: $(VENV)/.complete

# The stamp is written last: a .venv without it is half made and is made again. A newer pyproject.toml only updates what is there.
$(VENV)/.complete: pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*)
	@test -n "$(PYTHON)" || { echo "PYTHON: 3.11 or 3.12; got neither on PATH; install one or pass PYTHON=/path/to/python"; exit 2; }
	@test -e $@ || rm -rf $(VENV)
	@test -e $@ || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(TORCH)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e ".[dev]"
	-@$(BIN)/python setup.py -q build_ext --inplace > $(VENV)/build_ext.log 2>&1 || echo "no C++ kernels ($(VENV)/build_ext.log says why); plain torch does their work"
	@touch $@

sglang: $(SGLANG)/.complete

# Without its dependencies, which are for a GPU: the list is whole. Another list updates what is there.
$(SGLANG)/.complete: r1mega/compat/sglang_cpu/requirements.txt
	@test -n "$(PYTHON)" || { echo "PYTHON: 3.11 or 3.12; got neither on PATH; install one or pass PYTHON=/path/to/python"; exit 2; }
	@test -e $@ || rm -rf $(SGLANG)
	@test -e $@ || $(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m pip install --disable-pip-version-check --quiet $(TORCH)
	$(SGLANG)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -r $<
	@touch $@

quickstart: .venv
	$(BIN)/r1mega recipe recipe=quickstart name=$(NAME) launch.processes=$(if $(device),1,$(PROCESSES)) $(CHOICES)

test: .venv sglang
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-full: test
	$(BIN)/python -m pytest -q -m "slow or gpu"

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests/test_house.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	rm -f r1mega/_C*.so
	find r1mega tests configs -name __pycache__ -type d -prune -exec rm -rf {} +
