# make demo and make test set themselves up: Python >= 3.11 and pip are all that must be there.
PYTHON ?= python3
VENV   := .venv
OLDEST := .venv-oldest
BIN    := $(VENV)/bin
OLDEST_TRANSFORMERS := 5.17.0
OLDEST_TRITON := 3.6.0
PIP    := -m pip install --quiet --disable-pip-version-check
# Two processes of one thread each: at these sizes a second thread of torch gains nothing.
PYTEST := -m pytest -q -n 2 --dist worksteal
test test-integration test-all test-oldest fuzz: export OMP_NUM_THREADS = 1

.DEFAULT_GOAL := help
.PHONY: help demo example test test-integration test-all test-oldest fuzz check bench bench-gpu clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 20

$(VENV)/.stamp: pyproject.toml requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "Setting up $(VENV) (once, a few minutes)"
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP) "$$(grep '^torch==' requirements-dev.txt)"
	@$(BIN)/python $(PIP) -c requirements-dev.txt -e '.[dev]'
	@touch $@

# The oldest supported Transformers in a thin environment that borrows the rest from the first one.
$(OLDEST)/.stamp: $(VENV)/.stamp
	@test -d $(OLDEST) || $(BIN)/python -m venv $(OLDEST)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_borrowed.pth"
	@$(OLDEST)/bin/python $(PIP) transformers==$(OLDEST_TRANSFORMERS) triton==$(OLDEST_TRITON)
	@touch $@

demo: $(VENV)/.stamp  ## train a small GRIN MoE on real text, save it, load it elsewhere, chat (2 minutes, after the set-up)
	@$(BIN)/grinmoe demo --output demo-output

example: $(VENV)/.stamp  ## pretrain, sft with QLoRA, dpo on real text, and a report (about 5 minutes)
	@$(BIN)/python scripts/worked_example.py --output worked-example

test: $(VENV)/.stamp  ## the unit tests on a CPU (under 6 minutes on 2 cores)
	@$(BIN)/python $(PYTEST) -m "not integration and not slow and not gpu"

test-integration: $(VENV)/.stamp  ## the rest on a CPU: whole trainings, servers, commands, ranks, compilations (9 minutes)
	@$(BIN)/python $(PYTEST) -m "integration and not slow and not gpu"

test-all: $(VENV)/.stamp  ## both
	@$(BIN)/python $(PYTEST) -m "not slow and not gpu"

test-oldest: $(OLDEST)/.stamp  ## both on the oldest supported Transformers, without the tests marked newest_only
	@$(OLDEST)/bin/python -c 'import transformers; assert transformers.__version__ == "$(OLDEST_TRANSFORMERS)", transformers.__version__'
	@$(OLDEST)/bin/python $(PYTEST) -m "not newest_only and not slow and not gpu"

fuzz: $(VENV)/.stamp  ## hostile configs, checkpoints, rows, requests and command lines: 3000 random ones of each
	@$(BIN)/python $(PYTEST) tests/fuzzing -m "" --fuzz-examples 3000

check: $(VENV)/.stamp  ## ruff, mypy, symbolic links
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@find . -xtype l -not -path './.venv*' | (! grep .) || (echo "broken symbolic links above" >&2; exit 1)

bench: $(VENV)/.stamp  ## measure on this CPU and write dated reports (about 5 minutes; leave the machine alone meanwhile)
	@$(BIN)/python -m benchmarks cpu

bench-gpu:  ## measure on a GPU and write dated reports (23 minutes; by python3 with torch, triton and transformers alone)
	@$(PYTHON) -m benchmarks gpu

clean:  ## remove environments and build output
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info demo-output worked-example .pytest_cache .hypothesis .ruff_cache .mypy_cache
