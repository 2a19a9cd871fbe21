"""``python -m benchmarks.traffic --json OUT [--plot DIR]``: see docs/results_traffic.md.

Needs root (network namespaces with rate-limited links) and takes about 15 minutes. Exit status:
0 once everything was measured, 1 if a part failed, 2 where this machine cannot run it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from tqdm import tqdm

from benchmarks import tools
from benchmarks.goals import goals_table, write_report
from benchmarks.own_cluster import ClusterFailed
from benchmarks.testbed import machine
from benchmarks.testbed.network import NetworkFailed, remove_leftovers
from benchmarks.traffic import cluster, engines, measure, results
from benchmarks.traffic.hosts import LINK_MBIT, WorkerFailed, built_link
from benchmarks.traffic.results import Results
from launch.cluster.supervisor import StartFailed
from transfer.traffic import cgroup
from transfer.traffic.host import PROGRAMS, CommandFailed, Refused

FAILURES = (
    *(CommandFailed, NetworkFailed, Refused, WorkerFailed),
    *(engines.EngineFailed, ClusterFailed, StartFailed, OSError),
)
PARTS = ("link", "engine", "cluster")


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    tools.need(*tools.ENGINES, *tools.NETWORK, *PROGRAMS, "taskset", root=True)
    console, found, status = Console(stderr=True), Results(), 0
    if cgroup.mount_point() is None:
        console.print("cgroup v2 is not mounted: the senders' classes cannot be told apart")
        return tools.CANNOT_RUN
    remove_leftovers(Path(tempfile.gettempdir()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for part in arguments.parts:
        try:
            _measure(part, arguments, found)
        except FAILURES as error:
            console.print(f"{part}: {type(error).__name__}: {error}", style="red", markup=False)
            status = 1
    _report(arguments, found)
    return status


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.traffic", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="OUT", required=True)
    parser.add_argument("--plot", type=Path, metavar="DIR", help="where the picture goes")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.5, help="of each arm of a round")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    return parser.parse_args(argv)


def _measure(part: str, arguments: argparse.Namespace, found: Results) -> None:
    with tempfile.TemporaryDirectory(prefix=machine.scratch_prefix()) as scratch:
        if part == "cluster":
            with built_link((cluster.PREFILL, cluster.DECODE)) as link:
                found.cluster = cluster.measure(link, Path(scratch), tqdm.write)
        else:
            _measure_arms(part, arguments, Path(scratch), found)


def _measure_arms(part: str, arguments: argparse.Namespace, scratch: Path, found: Results) -> None:
    arms = measure.ARMS if part == "link" else engines.ARMS
    total = len(arms) * arguments.rounds
    with (
        tqdm(total=total, unit="arm", desc=part) as bar,
        built_link() as link,
    ):
        step: Callable[[], object] = bar.update
        if part == "link":
            measure.measure(link, arguments.rounds, arguments.seconds, step, found.link)
        else:
            engines.measure(link, arguments.rounds, scratch, step, found.engine)


def _report(arguments: argparse.Namespace, found: Results) -> None:
    goals = results.make_goals(found)
    console = Console()
    console.print(results.table(found))
    for name, value in results.harm(found).items():
        console.print(f"harm without either: {name}: {'-' if value is None else f'{value:.3g}'}")
    console.print(goals_table(goals))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "link_mbit": LINK_MBIT,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "demand_of_the_link": measure.DEMAND,
    }
    figures = {"machine": machine.describe(), "settings": settings}
    write_report(arguments.json, goals, figures | results.figures(found))
    if arguments.plot:
        from benchmarks.traffic.plot import draw

        draw(arguments.plot, found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
