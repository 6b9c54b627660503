# One verb per chore. Each sets up what it needs in .venv first; the second run skips that.

PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/.ready
TRAINERS := $(VENV)/.trainers
TRAINER_TESTS := tests/integrations tests/train/test_log.py tests/test_docs.py
# A terminal sees pip's progress; a log does not need it.
PIP_FLAGS := --disable-pip-version-check $(if $(MAKE_TERMOUT),,--quiet --quiet)
CXX_FILES = $(shell find csrc benchmarks tests -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

.PHONY: help train test test-integrations lint format docs bench wheel-check gpu-check gpu-ladder clean
.DELETE_ON_ERROR:

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

train: $(READY)  ## train; options go in ARGS, such as make train ARGS="--help"
	$(VENV)/bin/fbopt train $(ARGS)

test: $(READY)  ## run the tests; ARGS go to pytest, such as make test ARGS="-k penalty"
	$(VENV)/bin/python -m pytest -n auto --dist loadfile $(ARGS)

test-integrations: $(TRAINERS)  ## test with Lightning, Accelerate and Transformers, which it installs
	$(VENV)/bin/python -m pytest -n auto --dist loadfile $(TRAINER_TESTS) $(ARGS)

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

clean:  ## remove the virtual environment and what tools left behind
	rm -rf $(VENV) build docs/_build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml setup.py build_backend.py
	@echo "Installing fbopt and what it needs, torch above all, into $(VENV): some minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -e '.[train,test,dev,docs]'
	@touch $@

$(TRAINERS): $(READY)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -e '.[integrations]'
	@touch $@
