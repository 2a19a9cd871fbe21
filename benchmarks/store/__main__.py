"""The tiers against what is under them: ``python -m benchmarks.store --json OUT``.

Rates are medians of interleaved rounds. The limit beside each is what the best plain
reader or writer got on the same disk or from the same server, in the same rounds.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import tools
from benchmarks.goals import Goal, goals_table, write_report
from benchmarks.store.eviction import eviction_goals, measure_eviction
from benchmarks.store.index import measure_index, measure_lost_tables
from benchmarks.store.load import HiCacheLoad, Memory, RawFile, SsdLoad, busy_thread
from benchmarks.store.remote import measure_remote, remote_goals
from storage.tiers.io_threads import SWITCH_INTERVAL_S

KIB, MIB = 1 << 10, 1 << 20
BLOCK_BYTES = (64 * KIB, 256 * KIB, MIB, 4 * MIB)
SET_BYTES = 512 * MIB
"""What is stored at each block size."""
ROUNDS = 5
RAW_THREADS = (4, 8, 16)
WRITE_THREADS = 4
BUSY_BYTES = (64 * KIB, MIB, 4 * MIB)

Rates = dict[str, float]


def main(argv: Sequence[str]) -> int:
    """Exit status 0 once measured, 2 where this machine lacks something."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the report goes")
    parser.add_argument("--dir", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of every measurement")
    parser.add_argument(
        "--no-remote", action="store_true", help="leave out what needs a S3 server and a network"
    )
    arguments = parser.parse_args(argv)
    if not arguments.no_remote:
        tools.need(*tools.S3_SERVER, *tools.NETWORK)
    logging.basicConfig(level=logging.WARNING)
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as in an agent
    with tempfile.TemporaryDirectory(prefix="dualpath-store-", dir=arguments.dir) as folder:
        rates = measure_rates(Path(folder), arguments.rounds)
        figures = {"hit_rate_percent": measure_eviction()}
        figures |= measure_index(Path(folder) / "million")
        figures |= measure_lost_tables(Path(folder) / "lost")
        if not arguments.no_remote:
            figures["remote"] = measure_remote(Path(folder) / "remote", arguments.rounds)
    goals = goals_of(rates, figures)
    write_report(arguments.json, goals, {"bytes_per_s": rates, **figures})
    Console().print(goals_table(goals))
    return 0


def name_of(block_bytes: int) -> str:
    kib = block_bytes // KIB
    return f"{kib} KiB" if kib < 1024 else f"{kib // 1024} MiB"


def measure_rates(folder: Path, rounds: int) -> dict[str, Rates]:
    """Medians in bytes per second, by block size and by what was measured."""
    memory = Memory(64 * max(BLOCK_BYTES))
    raw = RawFile(folder / "raw", SET_BYTES, memory)
    rates = {}
    try:
        for block_bytes in BLOCK_BYTES:
            rates[name_of(block_bytes)] = _measure_size(folder, raw, memory, block_bytes, rounds)
    finally:
        raw.close()
    return rates


def _measure_size(
    folder: Path, raw: RawFile, memory: Memory, block_bytes: int, rounds: int
) -> Rates:
    blocks = SET_BYTES // block_bytes
    load = SsdLoad(folder / "ssd", block_bytes, blocks, memory)
    hicache = HiCacheLoad(folder / "hicache", block_bytes, blocks)
    seen: defaultdict[str, list[float]] = defaultdict(list)
    written_bytes, payload_bytes = 0, 0
    try:
        for _ in range(rounds):
            seen["read"].append(load.read())
            for threads in RAW_THREADS:
                seen[f"raw read, {threads} threads"].append(raw.read(block_bytes, threads))
            seen["SGLang file backend read"].append(hicache.read())
            if block_bytes in BUSY_BYTES:
                with busy_thread():
                    seen["read beside a busy thread"].append(load.read())
            before = _written_bytes(), load.tier.stats().io.write_bytes_total
            seen["write"].append(load.write())
            written_bytes += _written_bytes() - before[0]
            payload_bytes += load.tier.stats().io.write_bytes_total - before[1]
            seen["raw write"].append(raw.write(block_bytes, WRITE_THREADS))
    finally:
        load.tier.close()
    for name in ("ssd", "hicache"):
        shutil.rmtree(folder / name)
    rates = {name: statistics.median(values) for name, values in seen.items()}
    rates["write amplification"] = written_bytes / payload_bytes
    return rates


def _written_bytes() -> int:
    """What this process has sent to disks so far, as the kernel counts it."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["write_bytes"])


def goals_of(rates: dict[str, Rates], figures: dict[str, Any]) -> list[Goal]:
    """Every goal of the tiered store; those of parts that this does not measure have no value."""
    goals = []
    for size, measured in rates.items():
        best_raw = max(rate for name, rate in measured.items() if name.startswith("raw read"))
        least = 0.75 if size == "64 KiB" else 0.90
        ratio = measured["read"] / best_raw
        goals.append(Goal(f"ssd read {size} / best raw reader", ratio, "x", at_least=least))
        if size != "64 KiB":
            ratio = measured["write"] / measured["raw write"]
            goals.append(Goal(f"ssd write {size} / raw write", ratio, "x", at_least=0.85))
        if size in ("1 MiB", "4 MiB"):
            ratio = measured["read beside a busy thread"] / measured["read"]
            name = f"ssd read {size} beside a busy thread / without"
            goals.append(Goal(name, ratio, "x", at_least=0.60))
        ratio = measured["read"] / measured["SGLang file backend read"]
        name = f"ssd read {size} / SGLang file backend, page cache dropped"
        goals.append(Goal(name, ratio, "x", at_least=2.0))
    worst = max(measured["write amplification"] for measured in rates.values())
    goals += [
        Goal("write amplification", worst, "x", at_most=1.1),
        Goal("look-up of 2,000 keys among 1M, p99", figures["lookup_p99_ms"], "ms", at_most=2),
        Goal("restart with 1M blocks", figures["restart_s"], "s", at_most=10),
    ]
    goals += remote_goals(figures.get("remote", {}))
    return goals + eviction_goals(figures["hit_rate_percent"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
