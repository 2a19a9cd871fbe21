"""``transfer.check`` measures between two hosts: real Mooncake processes over a link of 50 Mbit/s,
in namespaces that the test makes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from transfer.traffic import cgroup
from transfer.traffic.classes import TrafficSettings
from transfer.traffic.ethernet import make_rules
from transfer.traffic.host import PROGRAMS, Host, run

CAN_RUN = os.geteuid() == 0 and all(map(shutil.which, PROGRAMS)) and cgroup.mount_point()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(not CAN_RUN, reason="needs root, iproute2, nftables and cgroup v2"),
]
GROUP = f"dualpath-check-{os.getpid()}"
HERE, THERE = "10.79.0.1", "10.79.0.2"
MBIT = 50.0
LARGEST_PACKET = "16384"
"""Of a slow link: a packet of 64 KiB would hold the next one up for 10 ms."""


def within(side: str) -> tuple[str, ...]:
    return ("nsenter", f"--net=/run/netns/{namespace(side)}")


def namespace(side: str) -> str:
    return f"dpcheck{os.getpid()}-{side}"


def checker(side: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        (*within(side), sys.executable, "-m", "transfer.check", *words, "--transfer", "tcp"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[3],
    )


@pytest.fixture(scope="module")
def link() -> Iterator[None]:
    """Two hosts; the second one serves."""
    serving = None
    try:
        for side in ("a", "b"):
            run(("ip", "netns", "add", namespace(side)))
        far = ("type", "veth", "peer", "name", "compute", "netns", namespace("b"))
        run(("ip", "-n", namespace("a"), "link", "add", "name", "compute", *far))
        for side, address in (("a", HERE), ("b", THERE)):
            space = ("ip", "-n", namespace(side))
            run((*space, "address", "add", f"{address}/24", "dev", "compute"))
            run((*space, "link", "set", "dev", "lo", "up"))
            run((*space, "link", "set", "dev", "compute", "gso_max_size", LARGEST_PACKET, "up"))
        serving = checker("b", "--serve", "--host", THERE)
        assert "serving checks" in serving.stdout.readline()
        yield
    finally:
        if serving is not None:
            serving.kill()
            serving.communicate()
        for side in ("a", "b"):
            run(("ip", "netns", "delete", namespace(side)))
        root = cgroup.mount_point()
        if root is not None:
            cgroup.remove(root / GROUP)


def measured() -> tuple[int, dict]:
    settings = json.dumps({"cgroup": GROUP})
    probe = checker("a", "--peer", THERE, "--seconds", "0.6", "--traffic", settings, "--json")
    out, errors = probe.communicate(timeout=60)
    assert probe.returncode != 3, errors
    return probe.returncode, json.loads(out)


def test_without_classes_the_harm_is_measured(link):
    shape = ("tbf", "rate", f"{MBIT:g}mbit", "burst", "64kb", "latency", "100ms")
    device = (*within("a"), "tc", "qdisc")
    run((*device, "add", "dev", "compute", "root", *shape))
    try:
        code, found = measured()
    finally:
        run((*device, "del", "dev", "compute", "root"))
    assert (code, found["state"]) == (1, "none")
    assert found["measured"]["high_beside_mbit"] < 0.85 * found["measured"]["high_alone_mbit"]


def test_with_classes_the_high_one_is_measured_to_keep_its_own(link):
    node = Host(within("a"))
    node.apply(make_rules("compute", MBIT, TrafficSettings(cgroup=GROUP)))
    try:
        code, found = measured()
    finally:
        node.remove("compute", GROUP)
    assert (code, found["state"]) == (0, "effect")
    numbers = found["measured"]
    assert numbers["high_beside_mbit"] > 0.9 * numbers["high_alone_mbit"]
    assert 0 < numbers["low_beside_mbit"] < 0.2 * numbers["low_alone_mbit"]
