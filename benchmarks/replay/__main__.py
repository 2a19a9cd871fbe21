"""Replay a trace of conversations and say who read what, and whether every hit was found.

``python -m benchmarks.replay [TRACE] [--policies prefill,split] [--json OUT] [-- CLUSTER FLAGS]``

Without ``--endpoint`` it starts a cluster of its own for each path policy, one after the
other, each with empty stores, and prints the policies side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import tools
from benchmarks.goals import Goal, write_report
from benchmarks.own_cluster import ClusterFailed, own_cluster
from benchmarks.replay.client import Outcome, replay, summary
from benchmarks.trace import BadTrace, PromptMaker, Turn, choose_sessions, load_trace
from scheduler.policies import POLICY_NAMES

DEFAULT_TRACE = Path(__file__).parents[1] / "traces" / "mooncake_conversation_cut.jsonl"
HIT_RATE_POINTS_MAX = 2.0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Flags of the benchmark; those after ``--`` are the cluster's."""
    argv = list(argv)
    own = argv[: argv.index("--")] if "--" in argv else argv
    parser = argparse.ArgumentParser("benchmarks.replay", description=__doc__.split("\n")[0])
    parser.add_argument("trace", nargs="?", type=Path, default=DEFAULT_TRACE)
    parser.add_argument("--sessions", type=_positive, default=30, help="conversations to replay")
    parser.add_argument("--scale", type=_fraction, default=Fraction(1, 8), help="of every length")
    parser.add_argument("--concurrency", type=_positive, default=4, help="requests at once")
    parser.add_argument(
        "--speed", type=float, default=0.0, help="keep the trace's times, so often sped up; 0: no"
    )
    parser.add_argument("--endpoint", help="URL of a running cluster instead of an own one")
    parser.add_argument("--policies", "--path-policy", type=_policies, help="comma-separated")
    parser.add_argument("--start-timeout-s", type=float, default=300.0)
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args(own)
    arguments.cluster_flags = argv[len(own) + 1 :]
    if arguments.endpoint and arguments.cluster_flags:
        parser.error("flags after -- are for an own cluster; leave out --endpoint")
    if arguments.endpoint and arguments.policies and len(arguments.policies) > 1:
        parser.error("a running cluster has one policy: name it, or none, with --endpoint")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 once everything was measured, 1 if a cluster failed, 2 for a bad trace
    or where this machine lacks something."""
    arguments = parse_arguments(argv)
    if not arguments.endpoint:
        tools.need(*tools.ENGINES)
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sessions = choose_sessions(load_trace(arguments.trace), arguments.sessions)
        turns = PromptMaker(arguments.scale).turns(sessions)
    except (BadTrace, OSError) as error:
        console.print(f"[red]{error}", highlight=False)
        return 2
    results: dict[str, dict[str, Any]] = {}
    failed = False
    for policy in _runs(arguments):
        try:
            results[policy] = _measure(arguments, policy, turns, console)
        except ClusterFailed as error:
            failed = True
            console.print(f"{policy}: {error}", style="red", highlight=False, markup=False)
    Console().print(_table(results))
    if arguments.json:
        write_report(arguments.json, goals(results), _figures(arguments, sessions, turns, results))
    return 1 if failed else 0


def goals(results: dict[str, dict[str, Any]]) -> list[Goal]:
    """Two for each policy, measured or not, and for whatever else was measured."""
    rows = []
    for policy in dict.fromkeys((*POLICY_NAMES, *results)):
        result = results.get(policy)
        points = hit_rate_points(result) if result else None
        failures = result["failed"] if result else None
        rows += [
            Goal(f"hit rate against the trace, {policy}", points, "points", HIT_RATE_POINTS_MAX),
            Goal(f"failed requests, {policy}", failures, "requests", 0),
        ]
    return rows


def hit_rate_points(result: dict[str, Any]) -> float | None:
    """Distance of the measured hit rate from the implied one; None without full blocks."""
    if result["hit_rate_percent"] is None:
        return None
    return float(abs(result["hit_rate_percent"] - result["hit_rate_implied_percent"]))


def _runs(arguments: argparse.Namespace) -> list[str]:
    if arguments.endpoint:
        return arguments.policies or ["endpoint"]
    return arguments.policies or list(POLICY_NAMES)


def _measure(
    arguments: argparse.Namespace, policy: str, turns: list[Turn], console: Console
) -> dict[str, Any]:
    if arguments.endpoint:
        return summary(_replay_with_bar(arguments, policy, arguments.endpoint, turns, console))
    with (
        console.status(f"{policy}: starting a cluster") as status,
        own_cluster(policy, arguments.cluster_flags, arguments.start_timeout_s) as url,
    ):
        status.stop()
        return summary(_replay_with_bar(arguments, policy, url, turns, console))


def _replay_with_bar(
    arguments: argparse.Namespace, policy: str, url: str, turns: list[Turn], console: Console
) -> list[Outcome]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task(policy, total=len(turns))

        def on_done(outcome: Outcome) -> None:
            progress.advance(bar)
            if outcome.error:
                progress.console.print(outcome.error, style="red", highlight=False, markup=False)

        return asyncio.run(replay(url, turns, arguments.concurrency, arguments.speed, on_done))


def _table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table("", *results, title="Replay")
    for label, field, form in (
        ("requests", "requests", "{}"),
        ("failed", "failed", "{}"),
        ("TTFT p50, s", "ttft_p50_s", "{:.3f}"),
        ("TTFT p95, s", "ttft_p95_s", "{:.3f}"),
        ("hit rate, %", "hit_rate_percent", "{:.2f}"),
        ("implied by the trace, %", "hit_rate_implied_percent", "{:.2f}"),
    ):
        values = (result[field] for result in results.values())
        table.add_row(label, *("-" if v is None else form.format(v) for v in values))
    for agent in sorted({agent for result in results.values() for agent in result["readers"]}):
        table.add_row(agent, *(_reader_cell(r["readers"].get(agent)) for r in results.values()))
    return table


def _reader_cell(reader: dict[str, Any] | None) -> str:
    if reader is None:
        return "-"
    read = [f"{tier} {size / 2**20:.1f} MiB" for tier, size in sorted(reader["read_bytes"].items())]
    return "\n".join([f"{reader['blocks']} blocks", *read])


def _figures(
    arguments: argparse.Namespace, sessions: list[Any], turns: list[Turn], results: dict[str, Any]
) -> dict[str, Any]:
    return {
        "workload": {
            "trace": arguments.trace.name,
            "scale": str(arguments.scale),
            "sessions": len(sessions),
            "turns_of_session": [len(session) for session in sessions],
            "requests": len(turns),
            "prompt_tokens": sum(len(turn.prompt) for turn in turns),
            "output_tokens": sum(turn.output_tokens for turn in turns),
            "concurrency": arguments.concurrency,
            "speed": arguments.speed,
            "cluster_flags": arguments.cluster_flags,
        },
        "policies": results,
    }


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _fraction(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction such as 1/8") from None


def _policies(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in POLICY_NAMES:
            raise argparse.ArgumentTypeError(
                f"unknown path policy {name!r}; choose from {', '.join(POLICY_NAMES)}"
            )
    return names


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
