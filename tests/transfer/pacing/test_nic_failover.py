"""Two hosts with two links between them: when one fails, KV moves over the other, in its class.

Each host has one address of its own, to which routes lead over both links: real Mooncake, real
routes, real queues, in namespaces that the test makes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from typing import Any

import pytest

from benchmarks.testbed.network import entered
from benchmarks.traffic.hosts import Worker
from common.block import BlockLayout
from common.messages.from_agents import JobEnded
from common.messages.from_gateway import Subscribe
from tests.samples import by_name
from tests.transfer.agent.agent_process import FakeGateway, running_agent
from tests.transfer.agent.fake_engine import FakeEngine
from tests.transfer.agent.test_agent import deliver, store
from transfer.traffic import cgroup
from transfer.traffic.classes import TrafficSettings
from transfer.traffic.ethernet import LOW, make_rules
from transfer.traffic.host import Host

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
    pytest.mark.skipif(cgroup.mount_point() is None, reason="cgroup v2 is not mounted"),
]
SETTINGS = TrafficSettings(cgroup=f"dualpath-test-{os.getpid()}")
HOSTS = {"a": "10.99.0.1", "b": "10.99.0.2"}
LINKS = ("link0", "link1")
MBIT = 200.0
LARGE = BlockLayout(4, 4, (4096, 1024))


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


def namespace(host: str) -> str:
    return f"dpfail{os.getpid()}-{host}"


def set_up(host: str, other: str) -> None:
    """Its addresses, and the routes over each link; the first one is preferred."""
    space, number = namespace(host), HOSTS[host][-1]
    for switch in ("all.rp_filter=2", "all.ignore_routes_with_linkdown=1"):
        name = f"net.ipv4.conf.{switch}"
        run("ip", "netns", "exec", space, "sysctl", "-qw", name)
    run("ip", "-n", space, "address", "add", f"{HOSTS[host]}/32", "dev", "lo")
    for metric, link in enumerate(LINKS, 10):
        run("ip", "-n", space, "address", "add", f"10.98.{metric}.{number}/24", "dev", link)
        run("ip", "-n", space, "link", "set", "dev", link, "up")
        gateway = f"10.98.{metric}.{HOSTS[other][-1]}"
        way = ("via", gateway, "dev", link, "src", HOSTS[host], "metric", str(metric))
        run("ip", "-n", space, "route", "add", HOSTS[other], *way)


@pytest.fixture
def hosts():
    try:
        for host in HOSTS:
            run("ip", "netns", "add", namespace(host))
            run("ip", "-n", namespace(host), "link", "set", "dev", "lo", "up")
        for link in LINKS:
            ends = [("name", link, "netns", namespace(host)) for host in HOSTS]
            run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        set_up("a", "b")
        set_up("b", "a")
        yield Host(("nsenter", f"--net=/run/netns/{namespace('a')}"))
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", namespace(host)], check=False)
        if (group := cgroup.find(SETTINGS.cgroup)) is not None:
            cgroup.remove(group)


def start(role: str, host: str, group: int | None = None) -> Worker:
    argv = ["ip", "netns", "exec", namespace(host), sys.executable]
    return Worker(role, [*argv, "-m", "benchmarks.traffic.worker", role, HOSTS[host], "0"], group)


def low_bytes(link: str) -> int:
    """What the link's queue of the low class has sent."""
    shown = run("tc", "-n", namespace("a"), "-s", "class", "show", "dev", link)
    return int(re.search(rf"class htb {LOW} .*?Sent (\d+) bytes", shown, re.DOTALL)[1])


def wait_until(holds, timeout_s: float = 8.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_kv_goes_over_to_the_other_nic_and_stays_in_its_class(hosts):
    for link in LINKS:
        hosts.apply(make_rules(link, MBIT, SETTINGS))
    sink = start("sink", "b")
    with cgroup.entry(SETTINGS.cgroup) as group:
        kv = start("kv", "a", group)
    try:
        kv.ask("start", target=sink.ready, pace="10MB", nic_bytes_per_s=0)
        wait_until(lambda: kv.ask("count")["bytes"] > 2_000_000)
        assert kv.ask("count")["nic"] == "link0"
        assert low_bytes("link0") > 2_000_000 and low_bytes("link1") < 10_000
        run("ip", "-n", namespace("b"), "link", "set", "dev", "link0", "down")
        sent = low_bytes("link0")
        wait_until(lambda: kv.ask("count")["nic"] == "link1")  # it looks once in a while
        before = kv.ask("count")["bytes"]
        wait_until(lambda: kv.ask("count")["bytes"] > before + 4_000_000)
        assert kv.ask("count")["failures"] == 0
        assert low_bytes("link1") > 2_000_000
        assert low_bytes("link0") - sent < 2_000_000
        paced = kv.ask("stop")
        for link in LINKS:
            assert paced[f'dualpath:agent_pacer_bytes_total{{nic="{link}"}}'] > 1_000_000
    finally:
        kv.close()
        sink.close()


def test_an_agent_holds_deliveries_over_a_link_to_its_rate(hosts, tmp_path):
    blocks, rate = range(40), 400_000
    control = f"tcp://{HOSTS['a']}:30100"
    here: dict[str, Any] = {"host": HOSTS["a"], "control": control, "pace": float(rate)}
    with entered(namespace("a")), running_agent(tmp_path, **here):
        gateway = FakeGateway(control)
        gateway.send(Subscribe())
        own = FakeEngine("d0", {"a0": control}, layout=LARGE, host=HOSTS["a"])
        with entered(namespace("b")):
            far = FakeEngine("p0", {"a0": control}, layout=LARGE, host=HOSTS["b"])
        try:
            for engine in (own, far):
                engine.wait_alive("a0")
            store(own, 1, blocks)
            gateway.read(7, blocks)
            for engine, least_s, most_s in ((own, 0.0, 0.5), (far, 0.8, 3.0)):
                began = time.monotonic()
                deliver(engine, 5, 7, blocks, blocks)
                ended = engine.wait_end(5)
                assert isinstance(ended, JobEnded) and ended.error == ""
                assert least_s * size(blocks) / rate <= time.monotonic() - began < most_s
            paced = 'dualpath:agent_pacer_bytes_total{nic="link0"}'
            gateway.status(lambda s: by_name(s.samples).get(paced) == size(blocks))
        finally:
            gateway.close()
            own.kill()
            far.kill()


def size(blocks: range) -> int:
    return len(blocks) * LARGE.block_bytes
