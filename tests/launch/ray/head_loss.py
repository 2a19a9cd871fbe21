"""By hand: Ray's head is lost, with its host and the driver, while real engines serve.

    python -m tests.launch.ray.head_loss [--head redis|other|same] [--seconds 120]

Requests go on all the while. Then the cluster is commanded again, by a head that has its tables
from Redis (package redis-server), or by a fresh one, which knows nothing. A fresh one at another
port lets the hosts of the old one be until they are brought to it, one by one; one at the same port
ends all that runs on them. Needs root and iproute2; takes three minutes and twice those seconds.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.testbed.network import entered
from tests.cluster import Cluster, RequestFailed, prompt
from tests.launch.ray.hosts import RayHosts, until

ROLES = {"h": "head", "a": "prefill", "b": "decode"}
PROFILE = """
all: {model: tiny, device: cpu, transfer: tcp, dram-bytes: 64MiB, ssd-bytes: 0,
      max-total-tokens: 20480, log-dir: LOGS, drain-timeout-s: 20}
pools:
  gateway: {labels: {dualpath-role: prefill}}
  prefill: {labels: {dualpath-role: prefill}}
  decode: {labels: {dualpath-role: decode}}
"""
START_TIMEOUT_S = 300
REDIS_PORT = 6380
REQUEST = prompt(300, seed=1)


class Check:
    """One loss of the head."""

    def __init__(self, hosts: RayHosts, head: str) -> None:
        self.hosts, self.head, self.with_redis = hosts, head, head == "redis"
        at = f"{hosts.address('h')}:{REDIS_PORT}"
        self.head_env = {"RAY_REDIS_ADDRESS": at} if self.with_redis else {}
        self.redis: subprocess.Popen[bytes] | None = None

    def start(self) -> Cluster:
        hosts = self.hosts
        if self.with_redis:
            flags = ["--bind", hosts.address("h"), "--port", str(REDIS_PORT), "--save", ""]
            argv = hosts.command("h", "redis-server", *flags, "--protected-mode", "no")
            self.redis = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        for name in ROLES:
            hosts.start_ray(name, **self.head_env)
        return self.drive()

    def drive(self) -> Cluster:
        profile = self.hosts.folder / "hosts.yaml"
        profile.write_text(PROFILE.replace("LOGS", str(self.hosts.folder / "logs")))
        process = self.hosts.driver(f"--hosts={profile}")
        return Cluster(process, f"http://{self.hosts.address('a')}:30000", self.hosts.folder)

    def lose_head(self) -> None:
        for words in ("gcs/gcs_server", "raylet/raylet", "launch.cluster"):
            self.hosts.kill("h", words)

    def serve(self, cluster: Cluster, seconds: float, expected: list[int]) -> tuple[int, int]:
        """Requests that had the expected tokens, and others."""
        good = bad = 0
        give_up_at = time.monotonic() + seconds
        while time.monotonic() < give_up_at:
            try:
                good += cluster.generate(REQUEST, timeout_s=30).output_ids == expected
            except (OSError, RequestFailed) as error:
                bad += 1
                say(f"a request failed: {error}")
            time.sleep(0.5)
        return good, bad

    def head_is_back(self) -> Cluster:
        """With a driver that asks it for the same cluster."""
        self.hosts.ray_port += self.head == "other"
        self.hosts.start_ray("h", **self.head_env)
        return self.drive()

    def bring_hosts(self) -> None:
        """One by one to the head that there is, the gateway's first."""
        hosts = self.hosts
        for name in ("a", "b"):
            stop = hosts.command(name, sys.executable, "-m", "ray.scripts.scripts", "stop")
            subprocess.run(stop, env=hosts.env, check=True, timeout=90)
            until(functools.partial(_is_empty, hosts, name), lambda: "not drained")
            hosts.start_ray(name)


def _is_empty(hosts: RayHosts, name: str) -> bool:
    """This process is in the namespace of one of them."""
    return not any(hosts.pids(name, words) for words in ("-m launch.", "sglang", "transfer.agent"))


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def run(check: Check, seconds: float) -> None:
    hosts = check.hosts
    cluster = check.start()
    cluster.wait_until(lambda: cluster.generate(REQUEST).output_ids, START_TIMEOUT_S, "it serves")
    expected = cluster.generate(REQUEST).output_ids
    incarnations = cluster.incarnations("engines")
    say("it serves; the head is lost with its driver")
    check.lose_head()
    cluster.process.wait(60)
    good, bad = check.serve(cluster, seconds, expected)
    assert cluster.incarnations("engines") == incarnations, "an engine was started anew"
    say(f"{seconds:g} s without a head: {good} requests answered, {bad} failed")
    began = time.monotonic()
    cluster = check.head_is_back()
    if check.with_redis:
        until(lambda: "taken over: " in hosts.said(), hosts.said, START_TIMEOUT_S)
    if check.head == "same":
        until(lambda: all(_is_empty(hosts, name) for name in "ab"), lambda: "not drained")
        say(f"{time.monotonic() - began:.0f} s after the fresh head's start all of it has ended")
    else:
        good, bad = check.serve(cluster, seconds, expected)
        say(f"{seconds:g} s beside the head that is back: {good} answered, {bad} failed")
        assert not bad and cluster.incarnations("engines") == incarnations
    if not check.with_redis:
        check.bring_hosts()
    say(f"scaled: {hosts.scale('--decode=+1').splitlines()[-1]}")
    names = {"p0", "d0", "d1"}
    cluster.wait_until(
        lambda: cluster.incarnations("engines").keys() == names, START_TIMEOUT_S, "all are there"
    )
    assert cluster.generate(REQUEST).output_ids == expected
    say(f"commanded again, with one engine more: {time.monotonic() - began:.0f} s after")
    for pid in hosts.pids("h", "launch.cluster"):
        os.kill(pid, signal.SIGTERM)
    assert cluster.process.wait(120) == 0
    assert hosts.left() == [], hosts.left()
    say("ended; nothing is left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", choices=("redis", "other", "same"), default="other")
    parser.add_argument("--seconds", type=float, default=120)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        hosts = RayHosts(ROLES, Path(folder))
        try:
            hosts.build()
            with entered(hosts.network.namespace("a")):
                run(Check(hosts, asked.head), asked.seconds)
        except BaseException:
            print(hosts.said()[-8000:])
            raise
        finally:
            hosts.remove()


if __name__ == "__main__":
    main()
