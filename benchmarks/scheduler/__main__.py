"""Decisions a second on one core, and how even the storage NICs of a fluid model are kept.

Needs no cluster and no other process; about 3 minutes on one core. Times of planning are those of
the reference machine, by the yardstick of the same run (:mod:`benchmarks.yardstick`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.goals import Goal, goals_table, write_report
from benchmarks.scheduler import balance, speed
from benchmarks.scheduler.balance import Balance, JobTime, Step
from benchmarks.scheduler.cluster import PAPER, THOUSAND
from benchmarks.scheduler.speed import PlanLoop, Speed
from benchmarks.yardstick import Yardstick

SMALL = (4, 8)
"""For the step response, where one node matters more."""
BLOCKS = 10_000_000
ROUNDS = 5
PLANS_A_ROUND = 500
POLICIES = ("n-way", "split", "shorter-queue", "round-robin", "prefill")
LOADS = (1.1, 1.5)
"""NICs barely saturated, where balance matters most, and with long queues."""
STEP_LOAD = 1.15
BALANCE_S = 60.0
JOB_TURNS = 48_000
SLOW_PART = 0.25

Uses = list[tuple[Balance, NDArray[np.float64]]]
Bar = Callable[[str], Callable[[float], None]]


def main(argv: Sequence[str]) -> int:
    """Exit status 0 once everything was measured."""
    parser = argparse.ArgumentParser("benchmarks.scheduler", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="goals and figures")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="pictures")
    arguments = parser.parse_args(argv)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def bar(name: str) -> Callable[[float], None]:
            task = progress.add_task(name, total=1.0)
            return lambda part: progress.update(task, completed=part)

        yardstick = Yardstick()
        measured, ratios, block_bytes = measure_speed(bar)
        yardstick.look()
        speeds = {name: of.scaled(yardstick.scale) for name, of in measured.items()}
        uses = measure_balance(bar)
        jobs = measure_jobs(bar)
        step = balance.step("n-way", SMALL, STEP_LOAD, bar("n-way, one node at a tenth"))
    rows = goals(speeds, ratios, [result for result, _ in uses], jobs, step)
    show(rows, speeds, [result for result, _ in uses], jobs)
    figures = {
        "yardstick": yardstick.figures(),
        "speed": msgspec.to_builtins(speeds),
        "directory_bytes_a_block": block_bytes,
        "balance": [msgspec.to_builtins(result) for result, _ in uses],
        "jobs_with_a_slow_node": msgspec.to_builtins(jobs),
        "step": msgspec.to_builtins(step),
    }
    if arguments.json:
        write_report(arguments.json, rows, figures)
    if arguments.plot:
        draw(arguments.plot, uses, step)
    return 0


# ---- the measurements --------------------------------------------------------------------


def measure_speed(bar: Bar) -> tuple[dict[str, Speed], dict[str, float], float]:
    """Speeds by arm; rates with 1,000 nodes over those with 144, medians of the rounds; and
    the directory's bytes a block."""
    directory, prompts = speed.full_directory(BLOCKS, bar("directory of 10M blocks"))
    block_bytes = directory.memory_bytes / len(directory)
    progress = bar("plans")
    loops: dict[str, PlanLoop] = {
        "policy, 144 nodes": speed.policy_alone(*PAPER),
        "policy, 1,000 nodes": speed.policy_alone(*THOUSAND),
        "look-up, 144 nodes": speed.with_directory(*PAPER, directory, prompts),
        "look-up, 1,000 nodes": speed.with_directory(*THOUSAND, directory, prompts),
    }
    for done in range(ROUNDS):
        for loop in loops.values():
            loop.round(PLANS_A_ROUND)
        progress((done + 1) / ROUNDS)
    ratios = {}
    for kind in ("policy", "look-up"):
        pair = loops[f"{kind}, 1,000 nodes"], loops[f"{kind}, 144 nodes"]
        large, small = (np.array(loop.plans_per_s) for loop in pair)
        ratios[kind] = float(np.median(large / small))
    return {name: loop.speed() for name, loop in loops.items()}, ratios, block_bytes


def measure_balance(bar: Bar) -> Uses:
    """Every policy at every load."""
    return [
        balance.balance(policy, PAPER, load, BALANCE_S, bar(f"{policy}, load {load}"))
        for load in LOADS
        for policy in POLICIES
    ]


def measure_jobs(bar: Bar) -> list[JobTime]:
    """With one node at a quarter of its speed."""
    progress, jobs = bar("jobs, one node at a quarter"), []
    for policy in ("n-way", "shorter-queue"):
        jobs.append(balance.job_times(policy, PAPER, LOADS[-1], JOB_TURNS, SLOW_PART))
        progress(len(jobs) / 2)
    return jobs


# ---- what came out -----------------------------------------------------------------------


def goals(
    speeds: dict[str, Speed],
    ratios: dict[str, float],
    balances: list[Balance],
    jobs: list[JobTime],
    step: Step,
) -> list[Goal]:
    """The issue's, in its order."""
    policy, lookup = speeds["policy, 144 nodes"], speeds["look-up, 144 nodes"]
    n_way = max(result.max_avg_worst for result in balances if result.policy == "n-way")
    return [
        Goal("plan p99, 144 nodes, policy only", policy.plan_p99_ms, "ms", at_most=1.0),
        Goal("plan p99, 144 nodes, look-up in 10M blocks", lookup.plan_p99_ms, "ms", at_most=1.0),
        Goal("plans, 144 nodes, policy only", policy.plans_per_s, "1/s", at_least=5000),
        Goal(
            "plans, 144 nodes, look-up of 1,000 keys in 10M blocks",
            lookup.plans_per_s,
            "1/s",
            at_least=1500,
        ),
        Goal("plans, 1,000 nodes over 144, policy only", ratios["policy"], "", at_least=0.6),
        Goal("plans, 1,000 nodes over 144, look-up", ratios["look-up"], "", at_least=0.6),
        Goal("n-way storage-NIC Max/Avg, worst 10 s window", n_way, "", at_most=1.05),
        Goal(
            "n-way job time over ideal, one node at a quarter",
            jobs[0].over_ideal,
            "",
            at_most=1.08,
        ),
        Goal(
            "shares read, distance from ideal from 10 s to 60 s after a step",
            step.worst_read,
            "",
            at_most=0.1,
        ),
        Goal(
            "shares given, distance from ideal from 10 s to 60 s after a step",
            step.worst_given,
            "",
            at_most=0.1,
        ),
    ]


def show(
    rows: list[Goal],
    speeds: dict[str, Speed],
    balances: list[Balance],
    jobs: list[JobTime],
) -> None:
    console = Console()
    console.print(goals_table(rows))
    table = Table("", "plan p50, ms", "p99, ms", "p99 by the wall clock, ms", "plans/s", "cycles/s")
    for name, of in speeds.items():
        times = (of.plan_p50_ms, of.plan_p99_ms, of.plan_p99_wall_ms)
        rates = (of.plans_per_s, of.cycles_per_s)
        table.add_row(name, *(f"{ms:.3f}" for ms in times), *(f"{rate:,.0f}" for rate in rates))
    console.print(table)
    table = Table("policy", "load", "Max/Avg", "worst window", "NIC use", "turns/s")
    for at in balances:
        ratios = f"{at.max_avg:.3f}", f"{at.max_avg_worst:.3f}", f"{at.use:.1%}"
        table.add_row(at.policy, f"{at.load:g}", *ratios, f"{at.turns_per_s:.0f}")
    console.print(table)
    table = Table("job, one node at a quarter", "s", "ideal, s", "over ideal")
    for job in jobs:
        figures = (job.job_s, job.ideal_s, job.over_ideal)
        table.add_row(job.policy, *("-" if v is None else f"{v:.3f}" for v in figures))
    console.print(table)


def draw(folder: Path, uses: Uses, step: Step) -> None:
    from benchmarks.scheduler import picture  # matplotlib takes seconds to import

    folder.mkdir(parents=True, exist_ok=True)
    barely = [(result, use) for result, use in uses if result.load == LOADS[0]]
    picture.nic_use(folder / "scheduler_nic_use.png", barely, PAPER)
    picture.step_response(folder / "scheduler_step.png", step, balance.BACK_S - balance.LEAD_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
