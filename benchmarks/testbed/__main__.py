"""``python -m benchmarks.testbed offline --json OUT [--plot DIR]``: see docs/testbed.md.

Exit status: 0 once everything was measured, 1 if something failed on the way, 2 where this
machine cannot run it, 130 after a signal. Beside OUT lie the raw rows as Parquet.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from tqdm import tqdm

from benchmarks import tools
from benchmarks.goals import Goal, goals_table, write_report
from benchmarks.own_cluster import ClusterFailed, tail
from benchmarks.radosgw import RadosGateway
from benchmarks.testbed import machine, report
from benchmarks.testbed.iperf import IperfFailed
from benchmarks.testbed.network import Network, NetworkFailed, Rates, remove_leftovers, within
from benchmarks.testbed.offline import AGENTS_PER_PREFILL, Plan, Race
from benchmarks.testbed.results import ARMS, Shape, ShapeResult
from launch.cluster.supervisor import StartFailed

SHAPES = {shape.name: shape for shape in (Shape(1, 1), Shape(1, 2), Shape(2, 2))}
STORE_BYTES = 2 << 30
RUN_MINUTES_MAX = 45
FAILURES = (ClusterFailed, StartFailed, IperfFailed, NetworkFailed, TimeoutError)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.testbed", description=__doc__.split("\n")[0])
    parser.add_argument("race", choices=["offline"])
    parser.add_argument("--json", type=Path, metavar="OUT", required=True)
    parser.add_argument("--plot", type=Path, metavar="DIR", help="pictures of NIC use over time")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--storage-mbit", type=float, default=50.0, help="of each storage link")
    parser.add_argument(
        "--compute-mbit", type=float, default=400.0, help="of each compute link (the paper: 8x)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Measure, and say what was measured."""
    arguments = parse_arguments(argv)
    tools.need(*tools.ENGINES, *tools.NETWORK, *tools.S3_SERVER, root=True)
    console, began = Console(stderr=True), time.monotonic()
    shapes = [SHAPES[name] for name in arguments.shapes]
    for name in remove_leftovers(Path(tempfile.gettempdir())):
        console.print(f"removed what a dead run has left: {name}", highlight=False)
    if troubles := machine.troubles(max(len(shape.nodes) for shape in shapes)):
        console.print(*troubles, sep="\n", style="red", highlight=False)
        return tools.CANNOT_RUN
    plan = Plan(shapes, [arm for arm in ARMS if arm in arguments.arms], arguments.rounds)
    results: list[ShapeResult] = []
    status = 0
    try:
        _measure(plan, Rates(arguments.storage_mbit, arguments.compute_mbit), results)
    except FAILURES as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        status = 1
    except KeyboardInterrupt:
        status = 130
    _report(arguments, plan, results, time.monotonic() - began)
    return status


def _measure(plan: Plan, rates: Rates, results: list[ShapeResult]) -> None:
    """Fill ``results`` shape by shape."""
    nodes = list(dict.fromkeys(node for shape in plan.shapes for node in shape.nodes))
    network = Network(nodes, rates)
    with (
        tempfile.TemporaryDirectory(prefix=machine.scratch_prefix()) as scratch,
        tqdm(total=plan.steps, unit="job") as bar,
    ):
        (Path(scratch) / "s3").mkdir()
        s3 = RadosGateway(
            Path(scratch) / "s3", network.store_address, within(network.store), STORE_BYTES
        )
        _end_on_sigterm()
        network.build()
        try:
            with network.entered():
                s3.start()
                race = Race(plan, network, s3, Path(scratch), bar.write, bar.update)
                for shape in plan.shapes:
                    results.append(race.run(shape))
                    _end_on_sigterm()  # the cluster's event loop has taken the handler away
        except StartFailed as error:  # its log is about to be removed
            bar.write(tail(error.log))
            raise
        finally:
            s3.stop()
            network.remove()


def _end_on_sigterm() -> None:
    """Ending by an exception lets every ``finally`` clean up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _report(
    arguments: argparse.Namespace, plan: Plan, results: list[ShapeResult], seconds: float
) -> None:
    goals = _goals(results, seconds)
    console = Console()
    console.print(report.arms_table(results))
    console.print(goals_table(goals))
    out: Path = arguments.json
    out.parent.mkdir(parents=True, exist_ok=True)
    figures = {
        "machine": machine.describe(),
        "settings": {
            "storage_mbit": arguments.storage_mbit,
            "compute_mbit": arguments.compute_mbit,
            "rounds": plan.rounds,
            "agents_of_each_prefill_node": AGENTS_PER_PREFILL,
            "agent": msgspec.structs.asdict(plan.agent),
        },
        "seconds": seconds,
        "shapes": {result.shape.name: result.figures() for result in results},
    }
    write_report(out, goals, figures)
    if results:
        report.write_parquet(out.parent, out.stem, results)
    if arguments.plot and results:
        arguments.plot.mkdir(parents=True, exist_ok=True)
        for result in results:
            report.draw(arguments.plot, result)


def _goals(results: Sequence[ShapeResult], seconds: float) -> list[Goal]:
    """Of every shape of the issue, measured or not."""
    measured = {result.shape.name: result for result in results}
    goals = []
    for name, shape in SHAPES.items():
        result = measured.get(name) or ShapeResult(shape, [], {}, {}, {})
        goals += result.goals()
    return [*goals, Goal("minutes of the whole run", seconds / 60, "min", RUN_MINUTES_MAX)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
