"""A gateway that is started by hand, for nodes to join."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import launch.gateway.__main__ as gateway_process
from launch.flags.gateway import lone_gateway
from launch.settings import BadConfig
from tests.common.ports import free_port
from transfer.control.keys import ENGINE_HTTP, derived

SECRET = "s" * 32


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(descriptor, SECRET.encode())
    os.close(descriptor)
    return file


def test_it_knows_nobody_but_the_secret_of_those_who_may_join(secret_file):
    argv = ["--host", "10.0.0.1", "--port", "31000", "--path-policy", "split"]
    config = lone_gateway([*argv, f"--cluster-secret-file={secret_file}"])
    assert (config.host, config.port, config.path_policy) == ("10.0.0.1", 31000, "split")
    assert (config.agents, config.engines, config.control_secret) == ({}, [], SECRET)
    assert config.keys.engine_key == derived(SECRET, ENGINE_HTTP)


def test_without_the_secret_it_does_not_start(secret_file):
    with pytest.raises(BadConfig, match="cluster-secret-file is needed"):
        lone_gateway([])
    secret_file.chmod(0o644)
    with pytest.raises(BadConfig, match="open to others"):
        lone_gateway([f"--cluster-secret-file={secret_file}"])


def test_settings_that_cannot_work_end_it_for_good(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch.gateway", "--port", "0"])
    with pytest.raises(SystemExit) as ended:
        gateway_process.main()
    assert ended.value.code == 2  # whoever starts it need not try again
    assert "--port 0" in capsys.readouterr().err


def answer(url: str, body: bytes | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def wait_for(url: str, text: bytes) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if text in answer(url)[1]:
                return
        except OSError:
            pass  # it does not listen yet
        time.sleep(0.1)
    raise TimeoutError(url)


def test_a_request_that_waits_is_told_that_the_gateway_stops(secret_file):
    url = f"http://127.0.0.1:{(port := free_port())}"
    argv = [sys.executable, "-m", "launch.gateway", "--port", str(port)]
    gateway = subprocess.Popen([*argv, f"--cluster-secret-file={secret_file}"])
    try:
        wait_for(f"{url}/metrics", b"dualpath:")
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(answer, f"{url}/generate", b'{"text": "hello"}')
            wait_for(f"{url}/metrics", b"dualpath:requests_without_engine 1.0")
            gateway.send_signal(signal.SIGTERM)
            status, body = asked.result(60)
        assert (status, json.loads(body)["error"]["message"]) == (503, "the gateway is stopping")
        assert gateway.wait(60) in (0, -signal.SIGTERM)
    finally:
        gateway.kill()
        gateway.wait()
