# One verb per chore. Each sets up what it needs in .venv first; the second run skips that.

PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/.ready
TRAINERS := $(VENV)/.trainers
TRAINER_TESTS := tests/integrations tests/train/test_log.py tests/test_docs.py
FBOPT_FUZZ ?= 2
FBOPT_FUZZ_SEED ?= $(shell date +%s)
# A terminal sees pip's progress; a log does not need it.
PIP_FLAGS := --disable-pip-version-check $(if $(MAKE_TERMOUT),,--quiet --quiet)
CXX_FILES = $(shell find csrc benchmarks tests -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

.PHONY: help train test test-integrations fuzz robustness sanitize mutants lint format docs bench wheel-check gpu-check gpu-ladder clean
.DELETE_ON_ERROR:

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

train: $(READY)  ## train; options go in ARGS, such as make train ARGS="--help"
	$(VENV)/bin/fbopt train $(ARGS)

test: $(READY)  ## run the tests; ARGS go to pytest, such as make test ARGS="-k penalty"
	$(VENV)/bin/python -m pytest -n auto --dist loadfile $(ARGS)

test-integrations: $(TRAINERS)  ## test with Lightning, Accelerate and Transformers, which it installs
	$(VENV)/bin/python -m pytest -n auto --dist loadfile $(TRAINER_TESTS) $(ARGS)

sanitize: $(READY)  ## run kernels and tests of ops under ASan, UBSan and TSan; ARGS="thread" one of them
	$(VENV)/bin/python -m benchmarks.sanitizers $(ARGS)

fuzz: $(READY)  ## attack files, runs, commands and ops for a minute; longer: make fuzz FBOPT_FUZZ=100
	FBOPT_FUZZ=$(FBOPT_FUZZ) FBOPT_FUZZ_SEED=$(FBOPT_FUZZ_SEED) $(VENV)/bin/python -m pytest tests/fuzz/attacks.py $(ARGS)

robustness: $(READY)  ## the table of docs/robustness.md, in an hour or more; ARGS="npz" for one class
	PYTHONPATH=tests $(VENV)/bin/python -m fuzz.table $(ARGS)

lint: $(READY)  ## check style, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/bin/mypy

format: $(READY)  ## format the Python and C++ files, and mend what ruff can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

docs: $(READY)  ## build the site into docs/_build/html; warnings are errors
	$(VENV)/bin/python -m sphinx -M html docs docs/_build -E -W --keep-going -n --quiet $(ARGS)

bench: $(READY)  ## check the kernels against the reference, then time them
	$(VENV)/bin/python -m benchmarks.ops $(ARGS)
	$(VENV)/bin/python -m benchmarks.step $(ARGS)

wheel-check: $(READY)  ## build a wheel, install and try it under several versions of torch
	$(VENV)/bin/python tests/wheel_check.py $(ARGS)

gpu-check: $(READY)  ## test and measure on a GPU; ARGS are stages, such as make gpu-check ARGS="ops"
	$(VENV)/bin/python -m benchmarks.gpu_check $(ARGS)

gpu-ladder: $(READY)  ## train the paper's rows at its own scale on a GPU; ARGS="--rehearse" without one
	$(VENV)/bin/python -m benchmarks.gpu_ladder $(ARGS)

mutants: $(READY)  ## put faults into the public modules, one by one: which do the tests miss? (hours)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) 'mutmut==3.8.1'
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/mutants.py $(ARGS)

clean:  ## remove the virtual environment and what tools left behind
	rm -rf $(VENV) build mutants docs/_build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml setup.py build_backend.py
	@echo "Installing fbopt and what it needs, torch above all, into $(VENV): some minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -e '.[train,test,dev,docs]'
	@touch $@

$(TRAINERS): $(READY)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -e '.[integrations]'
	@touch $@
