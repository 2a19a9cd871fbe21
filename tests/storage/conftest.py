"""Tiers of every kind, for the one contract suite."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tools
from benchmarks.radosgw import RadosGateway
from common.block import BlockKey, TierName
from storage.cli import main as cli_main
from storage.remote.tier import RemoteSettings, RemoteTier
from storage.ssd.tier import SsdTier
from storage.tiers.contract import BlockIO, Completion, Tier
from storage.tiers.memory_tier import MemoryTier

BLOCK_BYTES = 10_000
QUICK = RemoteSettings(threads=2, linger_s=0.02, timeout_s=10)
"""For remote tiers: a pack is closed soon."""


def no_wake() -> None:
    """For owners that poll by themselves."""


def key_of(number: int) -> BlockKey:
    return BlockKey(hashlib.sha256(f"block {number}".encode()).digest())


def payload_of(key: BlockKey, nbytes: int = BLOCK_BYTES) -> bytes:
    """The one right content of a block."""
    return hashlib.shake_128(key).digest(nbytes)


def finish(tier: Tier, count: int, timeout_s: float = 20.0) -> dict[BlockKey, Completion]:
    """Poll until ``count`` blocks have completed."""
    completions: list[Completion] = []
    end = time.monotonic() + timeout_s
    while len(completions) < count:
        completions += tier.poll()
        assert time.monotonic() < end, f"{len(completions)} of {count} blocks completed"
        time.sleep(0.001)
    assert len(completions) == count
    return {completion.key: completion for completion in completions}


def settle(tier: Tier, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Poll a tier that has nothing to complete until the condition holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert tier.poll() == []
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.001)


def write(tier: Tier, *keys: BlockKey) -> dict[BlockKey, Completion]:
    tier.submit_writes([BlockIO(key, memoryview(payload_of(key))) for key in keys])
    return finish(tier, len(keys))


def read(tier: Tier, key: BlockKey) -> tuple[Completion, bytes]:
    buffer = bytearray(BLOCK_BYTES)
    tier.submit_reads([BlockIO(key, memoryview(buffer))])
    return finish(tier, 1)[key], bytes(buffer)


@pytest.fixture
def closing() -> Iterator[Callable[[SsdTier], SsdTier]]:
    """Hands a tier back, and closes it after the test."""
    tiers: list[SsdTier] = []

    def closed_later(tier: SsdTier) -> SsdTier:
        tiers.append(tier)
        return tier

    yield closed_later
    for tier in tiers:
        tier.close()


@pytest.fixture(scope="session")
def radosgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RadosGateway]:
    if missing := tools.missing(*tools.S3_SERVER):
        pytest.skip(
            f"{', '.join(missing)} not installed: "
            "apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-common"
        )
    gateway = RadosGateway(tmp_path_factory.mktemp("radosgw"))
    try:
        gateway.start()
        yield gateway
    finally:
        gateway.stop()


Opened = Callable[[], Tier]


def _memory(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    return lambda: MemoryTier(TierName.SSD, no_wake, 100 * BLOCK_BYTES)


def _ssd(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    return lambda: SsdTier(tmp_path / "ssd", 100 * BLOCK_BYTES, no_wake, threads=2)


def _remote_file(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    return lambda: RemoteTier(f"file://{tmp_path}/remote", {}, no_wake, QUICK)


def _remote_memory(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    url = f"memory://{uuid.uuid4().hex}"
    return lambda: RemoteTier(url, {}, no_wake, QUICK)


def _remote_s3(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    gateway = request.getfixturevalue("radosgw")
    url = f"s3://{gateway.bucket}/{uuid.uuid4().hex}"
    return lambda: RemoteTier(url, gateway.options, no_wake, QUICK)


KINDS = {
    "memory": _memory,
    "ssd": _ssd,
    "file": _remote_file,
    "memory-url": _remote_memory,
    "s3": _remote_s3,
}


@pytest.fixture(
    params=[pytest.param(k, marks=[pytest.mark.slow] if k == "s3" else []) for k in KINDS]
)
def open_tier(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    """Opens a tier; each call again opens the same store (for the kinds that persist)."""
    return KINDS[request.param](request, tmp_path)


@pytest.fixture
def tier(open_tier: Opened) -> Iterator[Tier]:
    tier = open_tier()
    yield tier
    tier.close()


Run = Callable[..., tuple[int, Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command of storage.cli with --json; returns its exit status and what it printed."""

    def command(name: str, *arguments: object) -> tuple[int, Any]:
        status = cli_main([name, *map(str, arguments), "--json"])
        printed = capsys.readouterr()
        return status, json.loads(printed.out) if printed.out else printed.err

    return command
