# make setup                 everything that serving needs, into .venv (DEVICE=cuda: untested)
# make serve [ARGS=...]      a cluster on this machine; ARGS="--help" lists the flags
# make test [ARGS=...]       lint and all tests; ARGS go to pytest
# make check                 lint, types and the tests that are not slow, at once: under a minute
# make lint                  ruff and mypy
.PHONY: setup setup-test serve test check lint check-style check-types check-engines check-stores

DEVICE ?= cpu

setup:
	@DEVICE=$(DEVICE) scripts/setup.sh

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

# Fewer random examples than `make test`, and no test that is marked slow. Tests that import
# SGLang (13 s of CPU time) run in one process. Those of the gateway wait nearly all the time, those
# of agents and stores for processes and disks: four go on beside it.
QUICK = EXAMPLES=few .venv/bin/python -m pytest -m "not slow" --durations=9 --durations-min=4
WITHOUT_SGLANG = $(addprefix tests/,transfer launch/gateway launch/rollout launch/cluster storage \
    scheduler benchmarks)

check-engines: setup
	@$(QUICK) $(WITHOUT_SGLANG:%=--ignore=%) tests

check-stores: setup
	@$(QUICK) --numprocesses=4 --dist=worksteal $(WITHOUT_SGLANG)

check: setup
	@$(MAKE) --no-print-directory --jobs --keep-going --output-sync=target \
	    check-style check-types check-engines check-stores
	@echo "check: all well"

test: setup-test lint
	@# -W: SWIG's complaint at interpreter exit would follow pytest's last line.
	.venv/bin/python -W "ignore:builtin type :DeprecationWarning" -m pytest $(ARGS)
