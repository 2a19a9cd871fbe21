#!/usr/bin/env bash
# What docs/gpu.md lists, run on this machine's GPU: which checks pass, fail, or could not run.
#   scripts/gpu_check.sh          after `make setup DEVICE=cuda`; about ten minutes
#   scripts/gpu_check.sh -k "a_"  some of them; the arguments go to pytest
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=.venv/bin/python
[ -x "$PYTHON" ] || { echo "gpu check: run 'make setup DEVICE=cuda' first" >&2; exit 2; }
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu check: torch finds no CUDA device here, nothing was run" >&2
    exit 2
fi

echo "== the machine"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || true
"$PYTHON" - <<'PY'
from importlib.metadata import PackageNotFoundError, version

import torch

print("torch", torch.__version__, "CUDA", torch.version.cuda)
for name in ("sglang", "mooncake-transfer-engine-cuda13"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "is not installed")
PY
echo "kernel modules: $(lsmod | awk '/^(nvidia_peermem|nvidia|mlx5_ib|ib_core) /{print $1}' | paste -sd' ')"
echo "locked memory at most: $(ulimit -l)"

echo "== the checks (letters as in docs/gpu.md)"
"$PYTHON" -m pytest tests/gpu -rA --tb=short -p no:cacheprovider "$@"
code=$?
echo "== put the outcome, with the lines on the machine, into docs/gpu.md (code $code)"
exit "$code"
