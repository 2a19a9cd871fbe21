"""``python -m benchmarks.faults --minutes M --seed S --json OUT``: see docs/results_faults.md.

Exit status: 0 once everything was measured, 1 if something failed on the way, 2 where this
machine cannot run it, 130 after a signal. Beside OUT lie the schedule, the event log and, if a
token was wrong, all logs.
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
from typing import IO, Any

import msgspec
from rich.console import Console
from tqdm import tqdm

from benchmarks import tools
from benchmarks.clients.reference import FIRST, SECOND, make_conversations, make_other_weights
from benchmarks.faults.campaign import Campaign, as_line
from benchmarks.faults.schedule import Fault, make_schedule, menus
from benchmarks.faults.stage import NODES, Stage, built_network
from benchmarks.faults.verdict import figures, make_goals
from benchmarks.goals import goals_table, write_report
from benchmarks.own_cluster import ClusterFailed
from benchmarks.testbed import machine
from benchmarks.testbed.network import NetworkFailed, own_mounts, remove_leftovers
from launch.models.resolve import resolve_model

CONVERSATIONS = 8
FAILURES = (ClusterFailed, NetworkFailed, TimeoutError, OSError, RuntimeError)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="OUT", required=True)
    parser.add_argument(
        "--kinds", nargs="+", choices=menus(NODES), help="only these kinds of faults"
    )
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS, metavar="N")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    tools.need(*tools.ENGINES, *tools.NETWORK, *tools.S3_SERVER, *tools.DISKS, "nft", root=True)
    console = Console(stderr=True)
    for name in remove_leftovers(Path(tempfile.gettempdir())):
        console.print(f"removed what a dead run has left: {name}", highlight=False)
    out: Path = arguments.json
    out.parent.mkdir(parents=True, exist_ok=True)
    menu = menus(NODES)
    chosen = {kind: menu[kind] for kind in arguments.kinds or menu}
    schedule = make_schedule(arguments.minutes, arguments.seed, chosen)
    _write_schedule(out.with_suffix(".schedule.jsonl"), schedule)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    own_mounts()
    try:
        with out.with_suffix(".events.jsonl").open("wb") as events:
            return _measure(arguments, schedule, events, console)
    except KeyboardInterrupt:
        return 130


def _measure(
    arguments: argparse.Namespace, schedule: list[Fault], events: IO[bytes], console: Console
) -> int:
    began = time.monotonic()

    def note(what: str, value: Any) -> None:
        events.write(as_line(what, value, time.monotonic()))
        events.flush()

    prefix, status = machine.scratch_prefix(), 0
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        os.environ["TMPDIR"] = str(scratch)
        network = built_network()
        try:
            with network.entered():
                models = {FIRST: resolve_model("tiny")}
                models[SECOND] = make_other_weights(models[FIRST], scratch / "second")
                rng = random.Random(arguments.seed)
                console.print("right tokens, from plain SGLang ...")
                conversations = make_conversations(arguments.conversations, rng, models, scratch)
                with tqdm(total=arguments.minutes * 60, unit="s", mininterval=2) as bar:
                    campaign = Campaign(schedule, conversations, models, note, bar.update)
                    (logs := scratch / "logs").mkdir()
                    asked = msgspec.json.encode(conversations)
                    (logs / "conversations.json").write_bytes(asked)
                    with Stage(scratch, network).built() as stage:
                        work = campaign.run(stage, logs, arguments.minutes, arguments.seed)
                        asyncio.run(work)
        except FAILURES as error:
            console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
            status = 1
        finally:
            network.remove()
            if "campaign" in locals():
                _report(arguments, campaign, time.monotonic() - began, scratch / "logs")
    return status


def _report(arguments: argparse.Namespace, campaign: Campaign, seconds: float, logs: Path) -> None:
    goals, found = make_goals(campaign.records), figures(campaign.records)
    console = Console()
    console.print(goals_table(goals))
    console.print(found["answers"], found["faults"], found["first_right_answer_after_a_fault_s"])
    settings = {"minutes": arguments.minutes, "seed": arguments.seed}
    write_report(
        arguments.json,
        goals,
        {"machine": machine.describe(), "settings": settings, "seconds": seconds, **found},
    )
    if not all(goal.holds for goal in goals):
        kept = arguments.json.with_suffix(".kept")
        shutil.copytree(logs, kept, dirs_exist_ok=True)
        console.print(f"logs are kept in {kept}", highlight=False)


def _write_schedule(path: Path, schedule: Sequence[Fault]) -> None:
    path.write_bytes(b"".join(msgspec.json.encode(fault) + b"\n" for fault in schedule))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
