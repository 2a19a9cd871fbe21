"""``python -m benchmarks.models --json OUT``: see docs/results_models.md."""

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
from benchmarks.goals import goals_table, write_report
from benchmarks.models.before import Pairs, compare
from benchmarks.models.conversations import NoPrompt
from benchmarks.models.families import FAMILIES
from benchmarks.models.verdict import PROMPTS_MIN, goals_of, speed_goals, summary
from benchmarks.models.walk import Measured, measure
from benchmarks.own_cluster import ClusterFailed
from benchmarks.testbed import machine

FAILURES = (ClusterFailed, NoPrompt, TimeoutError, OSError)


def main(argv: Sequence[str]) -> int:
    """0 once measured, 1 if a part of it failed (what was measured is written either way), 2
    where this machine lacks something."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument(
        "--families", nargs="*", choices=FAMILIES, default=list(FAMILIES), metavar="NAME"
    )
    parser.add_argument("--prompts", type=int, default=PROMPTS_MIN, metavar="N")
    parser.add_argument(
        "--before", type=Path, metavar="TREE", help="a tree before parts, for plain models' speed"
    )
    arguments = parser.parse_args(argv)
    tools.need(*tools.ENGINES)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = Results()
    try:
        _measure_all(arguments, results)
    finally:  # also after a signal
        _report(arguments, results)
    return 1 if results.failures else 0


class Results(msgspec.Struct):
    """By family, and what has failed."""

    families: dict[str, Measured] = {}
    speeds: dict[str, Pairs] = {}
    failures: list[str] = []

    def failed(self, what: str, error: Exception) -> None:
        self.failures.append(f"{what}: {type(error).__name__}: {error}")
        print(self.failures[-1], file=sys.stderr)


def _measure_all(arguments: argparse.Namespace, results: Results) -> None:
    with tempfile.TemporaryDirectory(prefix=machine.scratch_prefix()) as scratch:
        for number, name in enumerate(arguments.families):
            folder = Path(scratch) / str(number)
            try:
                results.families[name] = _measure(name, arguments.prompts, folder)
            except FAILURES as error:
                results.failed(name, error)
        if arguments.before:
            try:
                compare(arguments.before.resolve(), Path(scratch), results.speeds)
            except FAILURES as error:
                results.failed("before", error)


def _report(arguments: argparse.Namespace, results: Results) -> None:
    found = results.families
    goals = [goal for name in arguments.families for goal in goals_of(name, found.get(name))]
    goals += speed_goals(results.speeds)
    Console().print(goals_table(goals))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    figures = {
        "machine": machine.describe(),
        "families": {name: msgspec.to_builtins(summary(each)) for name, each in found.items()},
        "speeds": results.speeds,
        "failures": results.failures,
    }
    write_report(arguments.json, goals, figures)


def _measure(name: str, prompts: int, folder: Path) -> Measured:
    with tqdm(bar_format="{desc} {elapsed}") as bar:
        return asyncio.run(
            measure(
                FAMILIES[name],
                prompts,
                folder,
                lambda step: bar.set_description(f"{name}: {step}"),
            )
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
