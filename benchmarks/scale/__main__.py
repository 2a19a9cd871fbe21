"""What one core can carry: CPU time of each part's unit of work, and the cores that the paper's
workload needs of it at 144 and at 1,000 nodes.

Times are of the reference machine, by the yardstick of the same run. Needs no cluster; takes some
five minutes on one core, and three processes at a time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.goals import Goal, goals_table, write_report
from benchmarks.scale import agent, decode, directory, gateway
from benchmarks.scale.agent import GQA, MLA
from benchmarks.scale.costs import Costs, cores, scaled
from benchmarks.yardstick import Yardstick

BLOCKS = 10_000_000
ROUNDS = 5
REQUESTS = 20
PLANS = 500
RANKS = 8


class Sizes(msgspec.Struct, frozen=True):
    """How much is measured."""

    blocks: int = BLOCKS
    """In the directory."""
    rounds: int = ROUNDS
    requests: int = REQUESTS
    plans: int = PLANS


def main(argv: Sequence[str]) -> int:
    """Exit status 0 once everything was measured."""
    parser = argparse.ArgumentParser("benchmarks.scale", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="goals and figures")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="in the directory")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each measurement")
    arguments = parser.parse_args(argv)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    yardstick = Yardstick()
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def bar(name: str) -> Callable[[float], None]:
            task = progress.add_task(name, total=1.0)
            return lambda part: progress.update(task, completed=part)

        measured = measure(Sizes(arguments.blocks, arguments.rounds), yardstick, bar)
    costs = scaled(measured, yardstick.scale)
    rows, needed = goals(costs), cores(costs)
    show(rows, needed, yardstick)
    if arguments.json:
        figures = {
            "yardstick": yardstick.figures(),
            "costs_s": msgspec.to_builtins(costs),
            "cores": needed,
            "reported": reported(costs, needed),
        }
        write_report(arguments.json, rows, figures)
    return 0


def measure(
    sizes: Sizes, yardstick: Yardstick, bar: Callable[[str], Callable[[float], None]]
) -> Costs:
    """As this machine does it. The yardstick is looked at after each part."""
    progress = bar("agent")
    mla = agent.measure(MLA, 1, 1, sizes.rounds)
    progress(1 / 3)
    mla_ranks = agent.measure(MLA, RANKS, 1, sizes.rounds)
    progress(2 / 3)
    gqa_ranks = agent.measure(GQA, RANKS, RANKS, sizes.rounds)
    progress(1.0)
    yardstick.look()
    progress = bar("decode engine")
    of_decode = decode.measure(sizes.rounds)
    progress(1.0)
    yardstick.look()
    progress = bar("gateway")
    of_gateway = gateway.measure(sizes.rounds, sizes.requests)
    progress(1.0)
    yardstick.look()
    of_directory, planning = directory.measure(
        sizes.blocks, sizes.plans, sizes.rounds, bar("directory, plans")
    )
    yardstick.look()
    return Costs(of_gateway, planning, of_directory, mla, mla_ranks, gqa_ranks, of_decode)


def goals(costs: Costs) -> list[Goal]:
    """Of issue 20, in its order."""
    of_gateway, of_directory = costs.gateway, costs.directory
    restart_s = 144 * 131_072 * of_directory.new_s
    return [
        Goal("gateway, request of 64K ids", of_gateway.request_s * 1e3, "ms", at_most=5.0),
        Goal("gateway, streamed token", of_gateway.token_s * 1e6, "us", at_most=15.0),
        Goal("plan p99, look-up, 144 nodes", costs.planning.small.plan_p99_ms, "ms", at_most=1.0),
        Goal("plan p99, look-up, 1,000 nodes", costs.planning.large.plan_p99_ms, "ms", at_most=1.0),
        Goal("agent, pull of a block, 1 rank", costs.mla.pull_block_s * 1e6, "us", at_most=80.0),
        Goal(
            f"agent, pull of a block, {RANKS} ranks",
            costs.gqa_ranks.pull_block_s * 1e6,
            "us",
            at_most=600.0,
        ),
        Goal("agent, step of 1,000 blocks", costs.mla.step_s * 1e6, "us", at_most=100.0),
        Goal("decode engine, filled block", costs.decode.block_s * 1e6, "us", at_most=50.0),
        Goal(
            "decode engine, part of a 20 ms step, 256 sequences",
            costs.decode.step_s / 0.02 * 100,
            "%",
            at_most=2.0,
        ),
        Goal("announcement of a block", of_directory.change_bytes, "bytes", at_most=10.0),
        Goal("announcement of a known block", of_directory.known_s * 1e6, "us", at_most=0.15),
        Goal("gateway restart, 144 agents of 131K blocks", restart_s, "s", at_most=10.0),
        Goal(
            "longest pause of the gateway's loop, growth to 10M blocks",
            of_directory.growth_pause_s * 1e3,
            "ms",
            at_most=50.0,
        ),
        Goal(
            "pause of an agent's loop, snapshot of 1M blocks",
            of_directory.snapshot_pause_s * 1e3,
            "ms",
            at_most=50.0,
        ),
    ]


def reported(costs: Costs, needed: dict[str, dict[str, float]]) -> dict[str, str]:
    """Beside the goals."""
    rows = {
        "agent, step of a turn's hit, GQA, 8 ranks, us": f"{costs.gqa_ranks.turn_step_s * 1e6:.0f}",
        "agent, a turn's pulls, a block, 1 rank, us": f"{costs.mla.pull_turn_block_s * 1e6:.0f}",
        "gateway, request of 32.7K ids, ms": f"{costs.gateway.turn_s * 1e3:.2f}",
        "gateway, a node each second, ms": f"{costs.gateway.node_s * 1e3:.2f}",
        "announcement of a known block, batches of 64, us": (
            f"{costs.directory.known_small_s * 1e6:.2f}"
        ),
    }
    for part, by_nodes in needed.items():
        rows[f"cores, {part}"] = ", ".join(f"{n}: {c:.2f}" for n, c in by_nodes.items())
    return rows


def show(rows: list[Goal], needed: dict[str, dict[str, float]], yardstick: Yardstick) -> None:
    console = Console()
    console.print(goals_table(rows))
    nodes = list(next(iter(needed.values())))
    table = Table("cores needed", *nodes, title="The paper's workload")
    for part, by_nodes in needed.items():
        table.add_row(part, *(f"{by_nodes[n]:.2f}" for n in nodes))
    console.print(table)
    console.print(
        f"yardstick: {yardstick.cpu_s:.4f} s of CPU time; times above are what was measured times "
        f"{yardstick.scale:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
