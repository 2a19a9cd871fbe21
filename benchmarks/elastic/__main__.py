"""``python -m benchmarks.elastic --json OUT [--plot DIR]``: see docs/results_elastic.md.

Exit status: 0 once everything was measured, 1 if something failed on the way, 2 where this
machine cannot run it, 130 after a signal.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import tools
from benchmarks.clients.reference import FIRST, make_conversations
from benchmarks.elastic.campaign import Campaign
from benchmarks.elastic.cluster import Cluster
from benchmarks.elastic.hosts import Hosts
from benchmarks.elastic.steps import NODES, Step, make_steps, parse_step
from benchmarks.elastic.verdict import Records, figures, make_goals
from benchmarks.goals import goals_table, write_report
from benchmarks.own_cluster import ClusterFailed
from benchmarks.testbed import machine
from benchmarks.testbed.network import NetworkFailed, own_mounts, remove_leftovers
from launch.models.resolve import resolve_model

CONVERSATIONS = 8
NEW_TOKENS = 24
FAILURES = (ClusterFailed, NetworkFailed, TimeoutError, OSError, RuntimeError)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.elastic", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="OUT", required=True)
    parser.add_argument("--plot", type=Path, metavar="DIR", help="where the picture goes")
    parser.add_argument("--rounds", type=int, default=1, help="of all steps; one takes 6 minutes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--steps",
        nargs="+",
        type=parse_step,
        metavar="KIND[:NODE[:CLOCK_S]]",
        help="these instead, such as join:d1 kill:d1 join:d1:3600 drain:d1 gateway",
    )
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS, metavar="N")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    tools.need(*tools.ENGINES, *tools.NETWORK, "mount", "umount", root=True)
    console = Console(stderr=True, highlight=False)
    for name in remove_leftovers(Path(tempfile.gettempdir())):
        console.print(f"removed what a dead run has left: {name}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    steps = arguments.steps or make_steps(arguments.rounds, arguments.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    own_mounts()
    try:
        return _measure(arguments, steps, console)
    except KeyboardInterrupt:
        return 130


def _measure(arguments: argparse.Namespace, steps: Sequence[Step], console: Console) -> int:
    began, records, status = time.monotonic(), Records(), 0

    def say(what: str) -> None:
        console.print(f"{time.monotonic() - began:6.1f} s  {what}", markup=False)

    prefix = machine.scratch_prefix()
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        (logs := scratch / "logs").mkdir()
        try:
            with Hosts(list(NODES), scratch).built() as hosts:
                model, rng = resolve_model("tiny"), random.Random(arguments.seed)
                say("right tokens, from plain SGLang ...")
                conversations = make_conversations(
                    arguments.conversations, rng, {FIRST: model}, scratch, NEW_TOKENS
                )
                campaign = Campaign(conversations, say)
                records = campaign.records

                async def run() -> None:
                    cluster = Cluster(hosts, model, scratch, logs)
                    await campaign.run(cluster, steps, arguments.seed)

                asyncio.run(run())
        except FAILURES as error:
            console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
            status = 1
        finally:
            _report(arguments, records, time.monotonic() - began, logs)
    return status


def _report(arguments: argparse.Namespace, records: Records, seconds: float, logs: Path) -> None:
    goals, found = make_goals(records), figures(records)
    console = Console(highlight=False)
    console.print(goals_table(goals))
    console.print(found["answers"], found["start_up_s"], found["drain_s"])
    settings = {"rounds": arguments.rounds, "seed": arguments.seed, "cores": os.cpu_count()}
    write_report(
        arguments.json,
        goals,
        {"machine": machine.describe(), "settings": settings, "seconds": seconds, **found},
    )
    if arguments.plot:
        from benchmarks.elastic.plot import draw  # matplotlib takes seconds to import

        draw(arguments.plot, records)
    if not all(goal.holds for goal in goals):
        kept = arguments.json.with_suffix(".kept")
        shutil.copytree(logs, kept, dirs_exist_ok=True)
        console.print(f"logs are kept in {kept}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
