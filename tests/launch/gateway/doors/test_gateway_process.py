"""The gateway's own process over TLS with keys, and the tools that call it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from common.process_settings import SECRETS
from common.user_files import write_private
from launch import top
from launch.access import Access
from launch.cluster.health import Prober
from launch.cluster.process_record import HealthCheck
from launch.gateway.config import GatewayConfig
from launch.gateway.doors.keys import read_keys
from launch.gateway.doors.settings import DoorKeys, DoorSettings
from launch.rollout.client import Client
from tests.common.ports import free_port
from tests.control import SECRET

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make a certificate"),
]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """Of localhost; its key, beside it, has the password "hush"."""
    file = tmp_path_factory.mktemp("tls") / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-keyout", str(file.with_suffix(".key")), "-passout", "pass:hush"),
            *("-out", str(file), "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost"),
        ],
        check=True,
        capture_output=True,
    )
    return file


@pytest.fixture(scope="module")
def url(certificate: Path) -> Iterator[str]:
    config = GatewayConfig(
        host="127.0.0.1",
        port=free_port(),
        agents={},
        engines=[],
        control_secret=SECRET,
        doors=DoorSettings(
            ssl_certfile=str(certificate), ssl_keyfile=str(certificate.with_suffix(".key"))
        ),
        keys=DoorKeys(read_keys("alice: key-a"), read_keys("root: key-r"), "hush"),
    )
    secrets = certificate.with_name("secrets")
    write_private(secrets, config.secrets())
    environ = {**os.environ, **config.to_env(), SECRETS: str(secrets)}
    process = subprocess.Popen([sys.executable, "-m", "launch.gateway"], env=environ)
    url = f"https://localhost:{config.port}"
    try:
        give_up_at = time.monotonic() + 60
        while True:
            with suppress(OSError):
                tls = Access(ca_certs=str(certificate)).tls()
                urllib.request.urlopen(f"{url}/metrics", timeout=5, context=tls).close()
                break
            assert process.poll() is None and time.monotonic() < give_up_at
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def test_top_shows_a_cluster_to_operators_alone(url, certificate, tmp_path, capsys, monkeypatch):
    write_private(tmp_path / "key", b"root: key-r\n")
    argv = ["--once", "--url", url, "--ssl-ca-certs", str(certificate)]
    assert top.main([*argv, "--api-key", f"@{tmp_path / 'key'}"]) == 0
    assert "DualPath" in capsys.readouterr().out
    assert top.main(argv) == 1
    assert "for operators" in capsys.readouterr().out
    monkeypatch.setenv("DUALPATH_ADMIN_API_KEY", "key-r")
    assert top.main(argv) == 0
    assert top.main(["--once", "--url", url]) == 1, "a certificate that nobody knows"
    assert "certificate" in capsys.readouterr().out


@pytest.mark.asyncio
async def test_the_supervisors_probe_needs_no_key_and_no_name(url) -> None:
    prober = Prober(run_folder="")
    try:
        target = url.replace("localhost", "127.0.0.1") + "/health"
        assert await prober.passes(HealthCheck("http", target, any_status=True))
    finally:
        await prober.close()


@pytest.mark.asyncio
async def test_a_rollout_job_brings_its_key(url, certificate) -> None:
    client = Client([url], 5.0, 5.0, Access("key-r", str(certificate)))
    try:
        assert await client.concurrency() == 256
    finally:
        await client.close()
