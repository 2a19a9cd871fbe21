# make setup                 everything that serving needs, into .venv (DEVICE=cuda: untested; RAY=1: Ray, too)
# make serve [ARGS=...]      a cluster on this machine; ARGS="--help" lists the flags
# make test [ARGS=...]       lint and all tests, or those that ARGS tell pytest
# make check                 lint, types and the tests that are not slow, at once: under a minute
# make lint                  ruff and mypy
# Python writes its bytecode: else each process compiles the tests that it loads, 3 s a time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup setup-test serve test check lint check-style check-types check-engines check-stores

DEVICE ?= cpu

setup:
	@DEVICE=$(DEVICE) RAY=$(RAY) scripts/setup.sh

setup-test:
	@DEVICE=$(DEVICE) scripts/setup.sh test

serve: setup
	@exec .venv/bin/python -m launch.cluster $(ARGS)

lint: check-style check-types

check-style: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

check-types: setup
	.venv/bin/mypy

# Tests that import SGLang (13 s of CPU time) run in one process. Those of the gateway wait nearly all
# the time, those of agents and stores for processes and disks: three go on beside it.
# -W: SWIG's complaint at interpreter exit would follow pytest's last line.
PYTEST = .venv/bin/python -W "ignore:builtin type :DeprecationWarning" -m pytest
TOGETHER = $(PYTEST) -m "not $(LATER)" --durations=9 --durations-min=4
LATER ?= (whole or alone)
WITHOUT_SGLANG = $(addprefix tests/,transfer launch/gateway launch/rollout launch/cluster launch/node launch/ray storage \
    scheduler benchmarks deploy)

# Nothing of SGLang's is compiled there: the compiler takes 3 s.
check-engines: setup
	@TORCHDYNAMO_DISABLE=1 $(TOGETHER) $(WITHOUT_SGLANG:%=--ignore=%) tests

check-stores: setup
	@$(TOGETHER) --numprocesses=3 --dist=$(DIST) $(WITHOUT_SGLANG)

DIST ?= loadfile
AT_ONCE = $(MAKE) --no-print-directory --jobs --keep-going --output-sync=target \
    check-style check-types check-engines check-stores

# Fewer random examples than `make test`, and no test that is marked slow.
check: setup
	@EXAMPLES=few $(AT_ONCE) LATER=slow DIST=worksteal
	@echo "check: all well"

# Whole clusters come after all others, two at a time: each waits half of the time. What measures
# rates or times has the machine to itself.
test: setup-test
ifeq ($(ARGS),)
	@$(AT_ONCE)
	$(PYTEST) -m whole --numprocesses=2 --dist=loadfile
	$(PYTEST) -m alone
else
	@$(MAKE) --no-print-directory lint
	$(PYTEST) $(ARGS)
endif
