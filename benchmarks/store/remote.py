"""The remote tier against a real S3 server: raw speed, a limited link, slow answers."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.goals import Goal
from benchmarks.radosgw import RadosGateway
from benchmarks.s3_proxy import FaultyProxy, Judge, Verdict
from benchmarks.store.load import DEPTH, Memory
from benchmarks.store.remote_client import (
    BLOCK_BYTES,
    BLOCKS,
    READ_BLOCKS,
    Job,
    PlainClients,
    Rate,
    RemoteLoad,
    Span,
    rated,
)
from benchmarks.testbed.iperf import storage_rates
from benchmarks.testbed.network import Network, Rates, within
from storage.remote.tier import RemoteSettings

LINK_MBIT = 400
LINK_BLOCKS = 48
"""Read in a round over the link: 4 s."""
NODE = "c0"
IPERF_S = 3
CLIENT_TIMEOUT_S = 120
SMALL_BYTES = 64 << 10
SMALL_BLOCKS = 512
HEDGED_READS = 300
SLOW_EVERY = 50
SLOW_S = 0.5
HEDGE_S = 0.05
MEMORY_BYTES = 2 << 30
"""Of the S3 server."""

Figures = dict[str, Any]


def measure_remote(folder: Path, rounds: int) -> Figures:
    """Without a link, whose goals then have no value, for who is not root."""
    folder.mkdir()
    memory = Memory(DEPTH * BLOCK_BYTES)
    figures: Figures = {}
    gateway = RadosGateway(_new(folder / "loopback"), memory_bytes=MEMORY_BYTES)
    try:
        gateway.start()
        figures |= _without_limit(gateway, memory, rounds)
        figures |= _slow_answers(gateway, memory)
    finally:
        gateway.stop()
    return figures | _in_a_process_of_its_own(folder / "link", rounds)


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


# ---- as fast as it goes -------------------------------------------------------------------


def _without_limit(gateway: RadosGateway, memory: Memory, rounds: int) -> Figures:
    url = f"s3://{gateway.bucket}/large"
    load = RemoteLoad(url, gateway.options, memory)
    small = RemoteLoad(f"s3://{gateway.bucket}/small", gateway.options, memory, SMALL_BYTES)
    seen: defaultdict[str, list[Rate]] = defaultdict(list)
    small_seen: defaultdict[str, list[float]] = defaultdict(list)
    try:
        load.fill(BLOCKS)
        small.fill(SMALL_BLOCKS)
        plain = PlainClients(gateway.bucket, gateway.options, _spans(load), memory).all()
        for _ in range(rounds):
            seen["remote tier"].append(load.read_some(READ_BLOCKS))
            for name, read in plain.items():
                nbytes = READ_BLOCKS * BLOCK_BYTES
                seen[name].append(rated(nbytes, partial(read, READ_BLOCKS)))
            small_seen["together"].append(small.read_together(SMALL_BLOCKS, DEPTH))
            small_seen["one by one"].append(small.read_together(SMALL_BLOCKS, 1))
    finally:
        load.tier.close()
        small.tier.close()
    medians = {
        name: {
            "bytes_per_s": statistics.median(rate.bytes_per_s for rate in rates),
            "cpu_s_per_gb": statistics.median(rate.cpu_s_per_gb for rate in rates),
        }
        for name, rates in seen.items()
    }
    coalesced = {name: statistics.median(rates) for name, rates in small_seen.items()}
    return {"clients": medians, "64 KiB blocks, bytes_per_s": coalesced}


def _spans(load: RemoteLoad) -> list[Span]:
    """Where the tier's blocks lie."""
    return [
        Span(f"large/{pack.path}", *pack.span(row))
        for pack in load.tier.known_packs()
        for row in range(len(pack.rows))
    ]


# ---- slow answers ---------------------------------------------------------------------------


def _slow_answers(gateway: RadosGateway, memory: Memory) -> Figures:
    """Every fiftieth answer comes half a second late; reads one by one, hedged and not."""
    host, _, port = gateway.options["endpoint_url"].removeprefix("http://").partition(":")
    proxy = FaultyProxy(host, int(port))
    options = {**gateway.options, "endpoint_url": f"http://{host}:{proxy.port}"}
    figures = {}
    for name, hedge_after_s in (("plain", 0.0), ("hedged", HEDGE_S)):
        settings = RemoteSettings(threads=4, hedge_after_s=hedge_after_s)
        url = f"s3://{gateway.bucket}/small"
        load = RemoteLoad(url, options, memory, SMALL_BYTES, settings)
        load.find(SMALL_BLOCKS)
        proxy.judge = _late_answers()
        latencies_s, packs = load.latencies_s(HEDGED_READS), load.tier.stats().packs
        proxy.judge = lambda method, path: Verdict()
        figures[name] = {
            "p50_ms": latencies_s[len(latencies_s) // 2] * 1e3,
            "p99_ms": latencies_s[len(latencies_s) * 99 // 100] * 1e3,
            "asked_twice": packs.hedged_reads_total if packs else 0,
        }
        load.tier.close()
    proxy.close()
    return {"reads with slow answers": figures}


def _late_answers() -> Judge:
    """Every ``SLOW_EVERY``-th of a fresh count."""
    numbers = itertools.count(1)
    return lambda method, path: Verdict(delay_s=0.0 if next(numbers) % SLOW_EVERY else SLOW_S)


# ---- a limited link -------------------------------------------------------------------------


def _in_a_process_of_its_own(folder: Path, rounds: int) -> Figures:
    """Entering a namespace is for good for the threads that a library starts meanwhile."""
    if os.geteuid():
        return {"link": "not measured: needs root"}
    command = [sys.executable, "-m", "benchmarks.store.remote", str(folder), str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=600, check=True)
    return {"link": msgspec.json.decode(done.stdout)}


def measure_link(folder: Path, rounds: int) -> Figures:
    """iperf3 and the tier in turn, from one namespace to the server in another."""
    network = Network([NODE], Rates(storage_mbit=LINK_MBIT, compute_mbit=LINK_MBIT))
    network.build()
    gateway = RadosGateway(
        *(_new(folder), network.store_address, within(network.store), MEMORY_BYTES)
    )
    seen: defaultdict[str, list[float]] = defaultdict(list)
    try:
        with network.entered():
            gateway.start()
        job = Job(f"s3://{gateway.bucket}/link", gateway.options, read_blocks=LINK_BLOCKS)
        with network.open_storage():
            _client(network, msgspec.structs.replace(job, fill=True))
        beside = msgspec.structs.replace(job, beside_uploads=True)
        for _ in range(rounds):
            seen["iperf3"].append(storage_rates(network, [NODE], IPERF_S)[NODE])
            seen["remote tier"].append(_client(network, job)["bytes_per_s"])
            busy = _client(network, beside)
            seen["remote tier beside uploads"].append(busy["bytes_per_s"])
            seen["uploaded bytes beside"].append(busy["uploaded_bytes"])
    finally:
        gateway.stop()
        network.remove()
    return {name: statistics.median(values) for name, values in seen.items()}


def _client(network: Network, job: Job) -> Figures:
    command = [sys.executable, "-m", "benchmarks.store.remote_client"]
    done = subprocess.run(
        [*within(network.namespace(NODE)), *command, msgspec.json.encode(job).decode()],
        stdout=subprocess.PIPE,
        timeout=CLIENT_TIMEOUT_S,
        check=True,
    )
    return dict(msgspec.json.decode(done.stdout))


# ---- goals ----------------------------------------------------------------------------------


def remote_goals(figures: Figures) -> list[Goal]:
    """The goals of the remote tier, without a value where it was not measured."""
    link, clients = figures.get("link"), figures.get("clients")
    of_link = of_raw = of_s3fs = None
    if isinstance(link, dict):
        of_link = link["remote tier"] / link["iperf3"]
    if clients:
        tier = clients["remote tier"]
        raw = max(clients[name]["bytes_per_s"] for name in ("obstore", "http.client"))
        of_raw = tier["bytes_per_s"] / raw
        of_s3fs = tier["cpu_s_per_gb"] / clients["s3fs"]["cpu_s_per_gb"]
    return [
        Goal("remote read / iperf3 on a limited link", of_link, "x", at_least=0.95),
        Goal("remote read / best raw client", of_raw, "x", at_least=0.75),
        Goal("remote read's CPU seconds a GB / s3fs's", of_s3fs, "x", at_most=1.0),
    ]


if __name__ == "__main__":
    print(msgspec.json.encode(measure_link(Path(sys.argv[1]), int(sys.argv[2]))).decode())
