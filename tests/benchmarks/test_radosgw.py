"""The S3 server of tests and benchmarks starts however busy the machine is."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from benchmarks import tools
from benchmarks.radosgw import RadosGateway

REFUSED_AT_FIRST = """
case "$*" in "ceph -c "*)
    if mkdir "$MARK" 2>/dev/null; then
        echo "Error EPERM: problem getting command descriptions from mon." >&2
        exit 1
    fi ;;
"radosgw -c "*)
    if mkdir "$MARK.gateway" 2>/dev/null; then exit 1; fi
esac
exec "$@"
"""


@pytest.mark.slow
def test_what_overtakes_the_monitors_map_is_started_again(tmp_path: Path, monkeypatch):
    if absent := tools.missing(*tools.S3_SERVER):
        pytest.skip(f"no {absent}")
    monkeypatch.setenv("MARK", str(tmp_path / "refused"))
    (root := tmp_path / "s3").mkdir()
    server = RadosGateway(root, within=("sh", "-c", REFUSED_AT_FIRST, "sh"))
    try:
        server.start()
        assert (tmp_path / "refused").exists() and (tmp_path / "refused.gateway").exists()
        server.signal_gateway(signal.SIGKILL)
        server.start_gateway()
    finally:
        server.stop()


def test_nothing_else_is_given_again(tmp_path: Path):
    server = RadosGateway(tmp_path, within=("sh", "-c", "echo EINVAL >&2; exit 1"))
    with pytest.raises(RuntimeError, match="EINVAL"):
        server._ask(time.monotonic() + 60, "osd", "stat")
