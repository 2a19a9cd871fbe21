"""Two gateways as processes, started by one command: one is always active, never both for long."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.user_files import write_private
from tests.cluster import get
from tests.common.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

TIMEOUT_S = 60.0


class Gateway:
    """A process that may be started again, at the same port."""

    def __init__(self, port: int, standby_of: str, secret: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._argv = [sys.executable, "-m", "launch.gateway", f"--port={port}"]
        self._argv += [f"--standby-of={standby_of}", f"--cluster-secret-file={secret}"]
        self.process = subprocess.Popen(self._argv)

    def start(self) -> None:
        self.process = subprocess.Popen(self._argv)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT_S)

    def standing(self) -> str:
        """An active one has no engines; a standby may have found none yet that is active."""
        try:
            said = json.loads(get(f"{self.url}/health", timeout_s=1.0)[1])
        except OSError:
            return "silent"
        return said["status"] if said.get("active", "somebody") else "alone"


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_takes_over_from_the_other_whatever_becomes_of_it(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    urls = ",".join(f"http://127.0.0.1:{port}" for port in ports)
    secret = tmp_path / "secret"
    write_private(secret, b"s" * 32)
    first, second = (Gateway(port, urls, secret) for port in ports)
    pair = (first, second)

    def wait_standings(*wanted: str) -> None:
        wait_until(lambda: tuple(one.standing() for one in pair) == wanted)

    try:
        wait_until(lambda: sorted(one.standing() for one in pair) == ["standby", "unavailable"])
        if first.standing() == "standby":
            pair = first, second = second, first

        first.kill()
        killed_s = time.monotonic()
        wait_standings("silent", "unavailable")
        print(f"from the SIGKILL to a takeover: {time.monotonic() - killed_s:.2f} s")
        first.start()
        wait_standings("standby", "unavailable")

        second.process.send_signal(signal.SIGSTOP)
        wait_standings("unavailable", "silent")
        second.process.send_signal(signal.SIGCONT)
        wait_standings("unavailable", "standby")  # it has begun anew, as the same process
        assert second.process.poll() is None
    finally:
        for one in pair:
            one.process.send_signal(signal.SIGCONT)
            one.kill()
