# Every target works from a bare clone: it makes .venv if it has to, then does its job. Where
# $(PYTHON) already has a torch that sees a GPU, demo, test, test-gpu, sanitize and bench run on it as it
# is.
# A CUDA build of torch asks for one exact Triton: with a GPU, .venv gets the torch whose Triton is
# the one that constraints.txt pins.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
TORCH := $(if $(wildcard /dev/nvidiactl),2.11.0,2.13.0)

ifneq ($(filter demo test test-all test-gpu sanitize memcheck racecheck bench golden,$(MAKECMDGOALS)),)
SEES_GPU := $(shell $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null && echo yes)
endif

ifeq ($(SEES_GPU),yes)
RUN := PYTHONPATH=$(CURDIR)$(addprefix :,$(PYTHONPATH)) $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := $(STAMP)
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-gpu sanitize memcheck racecheck lint bench golden clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(VENV)/constraints.txt
	$(VENV)/bin/python -m pip install -q -c $(VENV)/constraints.txt -e '.[test,dev,cuda]'
	@touch $@

demo: $(READY)  ## Render, compile, cache and run a kernel, and check its answer.
	@SSMGEN_CACHE_DIR=$(CURDIR)/cache/store $(RUN) -c 'from ssmgen.cli import main; main()' demo

test: $(READY)  ## Run the tests that need no GPU.
	@$(RUN) -m pytest -n auto -m 'not gpu'

test-all: $(READY)  ## The same, with every case of the products that test takes a cover of.
	@TEST_EVERY_CASE=1 $(RUN) -m pytest -n auto -m 'not gpu'

test-gpu: $(READY)  ## Run the tests that need a GPU; fails without one.
	@$(RUN) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: no GPU here")'
	@$(RUN) -m pytest $$($(RUN) -c 'import xdist' 2> /dev/null && echo '-n auto --maxprocesses 16') \
		-m 'gpu and not timed' tests/gpu; first=$$?; \
		$(RUN) -m pytest -m 'gpu and timed' tests/gpu && exit $$first

# Without torch's cache every tensor is an allocation of its own, whose end is seen.
SANITIZER = env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --report-api-errors no \
	--kernel-name kns=ssu_,kns=gdn_,kns=conv1d_ --require-cuda-init no --error-exitcode 1

sanitize: memcheck racecheck  ## Run kernels of every family under two tools of compute-sanitizer.

memcheck racecheck: $(READY)
	@command -v compute-sanitizer > /dev/null || { echo "make $@: compute-sanitizer, of the CUDA toolkit, is not on the PATH"; exit 1; }
	@$(SANITIZER) --tool $@ env $(RUN) tests/gpu/sanitize.py

bench: $(READY)  ## Measure everything on this GPU; writes benchmarks/results/.
	@$(RUN) -c 'from ssmgen.cli import main; main()' bench all --out benchmarks/results

golden: $(READY)  ## Write tests/golden anew after a change of a template; read the diff.
	@$(RUN) -m pytest --update-golden tests/golden/test_golden.py

lint: $(STAMP)  ## ruff check, ruff format --check, mypy.
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

clean:  ## Remove .venv, the checkout's store and all caches.
	rm -rf $(VENV) cache/store dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
