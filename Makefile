# Two commands are all a newcomer needs: `make quickstart` and `make test`. Each sets up .venv first, once.
#   make quickstart VENV=/big/disk/venv    put the environment elsewhere
#   make test KIND=cpu                     the CPU packages on a machine with a GPU
#   make test ARGS="-k merge -x"           arguments for pytest
#   make test JOBS=0                       in one process, for a debugger; each job needs about 3 GiB

VENV ?= .venv
PYTHON ?= $(or $(shell [ -x $(VENV)/bin/python ] && echo $(VENV)/bin/python || command -v python3 || command -v python),python3)
RUN := $(VENV)/bin/python
ARGS ?=
JOBS ?= 2
PYTEST := $(RUN) -m pytest -n $(JOBS) --dist loadfile
SYSTEM ?= $(shell uname -s)
# vLLM has no build for other systems: the quickstart then ends with ONNX Runtime.
WITHOUT_VLLM := --set export.formats=[onnx-fp32,onnx-int4] --set bench.runtimes=[transformers,onnx-fp32,onnx-int4]

.PHONY: help setup quickstart demo-7b check test lint format

help:
	@echo "make quickstart   set up, then train, merge, export, check and serve a small model"
	@echo "make demo-7b      set up, then fine-tune a 7B's shape in 4 bit for two steps: needs 8 GiB and no card"
	@echo "make check        set up, then lint and run the quick tests: two minutes, before each commit"
	@echo "make test         set up, then run all tests, with the real components: 26 minutes on 2 cores"
	@echo "make lint         set up, then ruff, mypy, the import contract and codespell"
	@echo "make format       set up, then let ruff rewrite the code"
	@echo "make setup        set up only"

setup:
	@$(PYTHON) -I qkit/setup/bootstrap.py --venv $(VENV) $(if $(KIND),--kind $(KIND))

quickstart: setup
	@$(VENV)/bin/qkit run recipes/quickstart.yaml$(if $(filter Linux,$(SYSTEM)),, $(WITHOUT_VLLM))

# Memory and time do not depend on what the weights are: they are random, and nothing is downloaded.
demo-7b: setup
	@$(RUN) benchmarks/demo_7b.py $(ARGS)

check: lint
	@$(PYTEST) -q -m "not gpu and not network and not slow" $(ARGS)

test: setup
	@$(PYTEST) $(ARGS)

lint: setup
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m mypy
	@$(VENV)/bin/lint-imports --no-cache
	@$(VENV)/bin/codespell

format: setup
	@$(RUN) -m ruff check --fix
	@$(RUN) -m ruff format
