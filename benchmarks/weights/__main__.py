"""``python -m benchmarks.weights --json OUT``: see docs/results_weights.md.

Exit status: 0 once everything was measured, 1 if something failed on the way (what was measured is
written either way), 2 where this machine cannot run it.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import tools
from benchmarks.goals import goals_table, write_report
from benchmarks.own_cluster import ClusterFailed
from benchmarks.testbed import machine
from benchmarks.weights.cases import MODES, WAYS, Case, make_cases
from benchmarks.weights.run import measure
from benchmarks.weights.verdict import Records, figures, make_goals

FAILURES = (ClusterFailed, TimeoutError, OSError, subprocess.SubprocessError)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("benchmarks.weights", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="OUT", required=True)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, metavar="MODE")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    tools.need(*tools.ENGINES)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    cases = make_cases(tuple(arguments.ways), tuple(arguments.modes))
    began, records = time.monotonic(), Records()
    console = Console(stderr=True, highlight=False)

    def say(what: str) -> None:
        console.print(f"{time.monotonic() - began:6.1f} s  {what}", markup=False)

    try:
        with tempfile.TemporaryDirectory(prefix=machine.scratch_prefix()) as folder:
            asyncio.run(measure(cases, arguments.seed, Path(folder), records, say))
    except FAILURES as error:
        records.failures.append(f"{type(error).__name__}: {error}")
        console.print(records.failures[-1], style="red", markup=False)
    finally:  # also after a signal
        _report(arguments, cases, records, time.monotonic() - began)
    return 1 if records.failures else 0


def _report(
    arguments: argparse.Namespace, cases: Sequence[Case], records: Records, seconds: float
) -> None:
    goals = make_goals(records, cases)
    Console().print(goals_table(goals))
    about = {"machine": machine.describe(), "seed": arguments.seed, "seconds": round(seconds)}
    write_report(arguments.json, goals, {**about, **figures(records)})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
