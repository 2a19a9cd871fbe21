"""``python -m benchmarks.quota --json OUT``: see docs/prefill.md. About 6 minutes on two cores.

Exit status: 0 once everything was measured, 1 if something failed on the way, 2 where this
machine lacks something.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import tools
from benchmarks.goals import Goal, goals_table, write_report
from benchmarks.own_cluster import ClusterFailed, tail
from benchmarks.quota import estimate, measure
from benchmarks.quota.estimate import Estimated
from benchmarks.quota.measure import Measured, Round
from benchmarks.quota.workload import trace_chunks
from launch.cluster.supervisor import StartFailed

GROUP_SIZES = (2, 4, 8)
ROUNDS = 7
BATCHES_MIN = 200

Estimates = dict[int, dict[str, Estimated]]


def main(argv: Sequence[str]) -> int:
    """Measure, and say what was measured."""
    parser = argparse.ArgumentParser("benchmarks.quota", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="OUT", required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="each arm's turns")
    arguments = parser.parse_args(argv)
    tools.need(*tools.ENGINES)
    console, status = Console(stderr=True), 0
    requests = trace_chunks()
    estimates = {ranks: estimate.compare(requests, ranks) for ranks in GROUP_SIZES}
    rounds: list[Round] = []
    with (
        tempfile.TemporaryDirectory(prefix="dualpath-quota-") as folder,
        console.status("starting five engines") as bar,
    ):
        try:
            rounds = asyncio.run(
                measure.measure(requests, arguments.rounds, Path(folder), bar.update)
            )
        except (ClusterFailed, StartFailed, OSError, TimeoutError) as error:
            console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
            for log in sorted(Path(folder).glob("*.log")):
                console.print(log.name, tail(log), sep="\n", markup=False, highlight=False)
            status = 1
    arms = {
        name: Measured.of([turn for turn in rounds if turn.arm == name])
        for name in ("quota", "fixed")
        if rounds
    }
    rows = goals(estimates[2]["quota"], arms.get("quota"), rounds)
    show(rows, estimates, arms)
    write_report(arguments.json, rows, figures(estimates, arms, rounds))
    return status


def goals(estimated: Estimated, measured: Measured | None, rounds: Sequence[Round]) -> list[Goal]:
    """The issue's, measured or not."""
    ratio = throughput(rounds, "seconds") if rounds else None

    def of(name: str) -> float | None:
        return None if measured is None else float(getattr(measured, name))

    largest = estimated.largest_s / estimate.QUOTA_S
    return [
        Goal("attention Max/Avg of 2 ranks, estimated, trace", estimated.max_avg, "", 1.03),
        Goal("largest batch over quota, estimated, trace", largest, "", 1.0),
        Goal("batches compared", of("full_batches_compared"), "", at_least=BATCHES_MIN),
        Goal("attention Max/Avg of 2 engines, CPU time", of("max_avg"), "", 1.10),
        Goal("estimate error, median", of("error_median"), "", 0.10),
        Goal("p99 of batch over quota, CPU time", of("over_quota_p99"), "", 1.3),
        Goal("throughput over fixed chunks", ratio, "", at_least=0.97),
    ]


def throughput(rounds: Sequence[Round], of: str) -> float:
    """Median of quota over fixed."""
    return float(np.median(measure.throughput_ratios(rounds, lambda turn: getattr(turn, of))))


def figures(
    estimates: Estimates, arms: dict[str, Measured], rounds: Sequence[Round]
) -> dict[str, Any]:
    """Everything else."""
    return {
        "estimated": {
            "quota_s": estimate.QUOTA_S,
            "chunk_tokens_max": estimate.TOKENS_MAX,
            "cost": msgspec.to_builtins(estimate.GPU),
            "groups": msgspec.to_builtins(estimates, str_keys=True),
        },
        "measured": {
            "quota_ms": measure.QUOTA_MS,
            "fixed_chunk_tokens": measure.FIXED_TOKENS,
            "lengths_divided_by": measure.LENGTH_DIVISOR,
            "arms": msgspec.to_builtins(arms),
            "throughput_ratios": _ratios(rounds, "seconds"),
            "cpu_throughput_ratios": _ratios(rounds, "cpu_s"),
            "rounds": msgspec.to_builtins(rounds),
        },
    }


def _ratios(rounds: Sequence[Round], of: str) -> list[float]:
    return measure.throughput_ratios(rounds, lambda turn: getattr(turn, of))


def show(rows: list[Goal], estimates: Estimates, arms: dict[str, Measured]) -> None:
    console = Console()
    table = Table("ranks", "packing", "steps", "Max/Avg", "to the end", "longest, s", "tokens")
    for ranks, pair in estimates.items():
        for name, of in pair.items():
            table.add_row(
                str(ranks),
                name,
                str(of.steps),
                f"{of.max_avg:.3f}",
                f"{of.max_avg_to_the_end:.3f}",
                f"{of.largest_s:.3f}",
                f"{of.mean_tokens:,.0f}",
            )
    table.title = "By the cost model, on the trace's lengths"
    console.print(table)
    measured = Table("", *arms, title="On engines")
    for field in Measured.__struct_fields__:
        measured.add_row(field, *(f"{getattr(of_arm, field):,.3f}" for of_arm in arms.values()))
    console.print(measured)
    console.print(goals_table(rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
