"""``python -m benchmarks.layer_window --json OUT [--plot DIR]``: see docs/results_window.md.

Needs root (network namespaces with rate-limited links) and takes about 10 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from tqdm import tqdm

from benchmarks import tools
from benchmarks.goals import Goal, goals_table, write_report
from benchmarks.layer_window.arms import LAYERS, WINDOW, Arms, make_records
from benchmarks.layer_window.cores import CoresNotApart
from benchmarks.layer_window.measure import STEPS, Measurement, Results, describe
from benchmarks.own_cluster import ClusterFailed
from benchmarks.testbed import machine
from benchmarks.testbed.cluster import Gateway, in_cluster
from benchmarks.testbed.iperf import IperfFailed
from benchmarks.testbed.network import OPEN_MBIT, Network, NetworkFailed, Rates
from launch.cluster.supervisor import StartFailed

FAILURES = (ClusterFailed, CoresNotApart, IperfFailed, NetworkFailed, StartFailed, TimeoutError)


def main(argv: Sequence[str]) -> int:
    """0 once measured, 1 if a part of it failed (what was measured is written either way), 2
    where this machine lacks something."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer_window", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--plot", type=Path, help="folder for the picture")
    arguments = parser.parse_args(argv)
    tools.need(*tools.ENGINES, *tools.NETWORK, root=True)
    results, status = Results(), 0
    try:
        _measure(results)
    except FAILURES as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        status = 1
    goals = make_goals(results)
    Console().print(goals_table(goals))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    figures = {"settings": describe(), "machine": machine.describe()}
    write_report(arguments.json, goals, figures | {"measured": msgspec.to_builtins(results)})
    if arguments.plot and results.held_bytes:
        from benchmarks.layer_window.plot import draw

        draw(arguments.plot, results)
    return status


def _measure(results: Results) -> None:
    network = Network(["p0", "p1", "p2", "d0"], Rates(OPEN_MBIT, OPEN_MBIT))
    measurement = Measurement(network, results)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with (
        tempfile.TemporaryDirectory(prefix=machine.scratch_prefix()) as scratch,
        tqdm(total=STEPS, unit="request") as bar,
    ):
        config, records = make_records(network, Path(scratch) / "logs")
        network.build()

        async def work(gateway: Gateway) -> None:
            await measurement.run(Arms(gateway, bar.update))

        try:
            with network.entered():
                asyncio.run(in_cluster(records, config, bar.write, work))
        finally:
            network.remove()


def make_goals(results: Results) -> list[Goal]:
    """Every goal of the layer window, measured or not."""
    slow = None
    if results.slow_wait_s is not None and results.slow_excess_s:
        slow = results.slow_wait_s / results.slow_excess_s
    hidden = results.open_wait.of_forward if results.open_wait is not None else None
    return [
        Goal(
            "device KV bytes at equal tokens, of all's",
            results.kv_bytes_ratio,
            "",
            at_most=WINDOW / LAYERS + 0.05,
        ),
        Goal("answers with other tokens than all's", results.other_tokens, "", at_most=0),
        Goal("largest batch, of L/W times all's", results.batch_ratio, "", at_least=0.9),
        Goal("prefill time of one request, of all's", results.prefill_ratio, "", at_most=1.10),
        Goal("throughput of 32 requests, of all's", results.throughput_ratio, "", at_least=1.3),
        Goal(
            "throughput of 32 requests, of loading each whole before its forward",
            results.whole_ratio,
            "",
            at_least=1.3,
        ),
        Goal(
            "forwards wait for KV where bandwidth suffices, first W layers aside",
            hidden,
            "of their time",
            at_most=0.05,
        ),
        Goal("wait where it does not, of bytes/rate - compute", slow, "", at_most=1.2),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
