# make setup                 everything that serving needs, into .venv (DEVICE=cuda: untested)
# make serve [ARGS=...]      a cluster on this machine; ARGS="--help" lists the flags
# make test [ARGS=...]       lint and all tests; ARGS go to pytest
# make lint                  ruff and mypy
.PHONY: setup setup-test serve test lint

DEVICE ?= cpu

setup:
	@DEVICE=$(DEVICE) scripts/setup.sh

setup-test:
	@DEVICE=$(DEVICE) scripts/setup.sh test

serve: setup
	@exec .venv/bin/python -m launch.cluster $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test: setup-test lint
	@# -W: SWIG's complaint at interpreter exit would follow pytest's last line.
	.venv/bin/python -W "ignore:builtin type :DeprecationWarning" -m pytest $(ARGS)
