"""``python -m benchmarks.rollout``: does a job keep the cluster full, and what does it cost?

Three measurements on one cluster of the ``tiny`` model. *Pairs*: a job and a bare loop send
requests of the same lengths, one after the other, each pair with prompts of its own, so that
nothing is a hit. *Episodes*: 64 prompts x 8 samples x 4 turns, whose hits are compared with
what the structure allows: the full blocks that an earlier request of the episode, or the
prompt that its samples share, has computed. *Orders*: requests in flight over a job whose last
rows have long prompts, in the order of the input and longest first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pyarrow.parquet as pq
from rich.console import Console

from benchmarks import tools
from benchmarks.goals import Goal, goals_table, write_report
from benchmarks.own_cluster import ClusterFailed, own_cluster
from benchmarks.rollout.turns import TURNS, VOCABULARY
from launch.rollout.__main__ import main as rollout

PAGE_TOKENS = 64
PAIRS, PAIR_REQUESTS, PAIR_PROMPT_TOKENS, PAIR_NEW_TOKENS = 11, 96, 200, 32
PROMPTS, SAMPLES = 64, 8
EPISODE_PROMPT_TOKENS, EPISODE_NEW_TOKENS = 330, 16
ORDERS = ("input", "longest-first")
SHORT_PROMPTS, SHORT_TOKENS, LONG_PROMPTS, LONG_TOKENS = 96, 100, 6, 4000
CONCURRENCY = 16
FULL_PERCENT_MIN, JOB_RATIO_MAX, HIT_POINTS_MAX = 95.0, 1.05, 2.0
START_TIMEOUT_S = 240.0


def main(argv: Sequence[str]) -> int:
    """Measure and report; returns the exit code (1: something could not be measured, 2: this
    machine lacks something)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report here")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    arguments = parser.parse_args(argv)
    tools.need(*tools.ENGINES)
    console = Console(stderr=True)
    pairs: dict[str, Any] = {}
    episodes: dict[str, Any] = {}
    orders: dict[str, Any] = {}
    failed = False
    try:
        with (
            tempfile.TemporaryDirectory(prefix="dualpath-rollouts-") as folder,
            console.status("starting a cluster") as status,
            own_cluster("shorter-queue", [], START_TIMEOUT_S) as url,
        ):
            status.stop()
            pairs = measure_pairs(url, Path(folder), arguments.pairs)
            orders = measure_orders(url, Path(folder))
            episodes = measure_episodes(url, Path(folder), arguments.prompts)
    except (ClusterFailed, MeasurementFailed) as error:
        failed = True
        console.print(str(error), style="red", markup=False)
    found = goals(pairs, episodes)
    Console().print(goals_table(found))
    if arguments.json:
        figures = {"pairs": pairs, "episodes": episodes, "orders": orders}
        write_report(arguments.json, found, figures)
    return 1 if failed else 0


class MeasurementFailed(Exception):
    """A job or a request of the benchmark failed."""


def goals(pairs: dict[str, Any], episodes: dict[str, Any]) -> list[Goal]:
    """Of whatever was measured."""
    return [
        Goal(
            "time with as many requests in flight as could be",
            episodes.get("full_percent"),
            "%",
            at_least=FULL_PERCENT_MIN,
        ),
        Goal(
            "time of a job beside a bare loop",
            pairs.get("ratio_median"),
            "x",
            at_most=JOB_RATIO_MAX,
        ),
        Goal(
            "hit rate of 64 prompts x 8 samples x 4 turns beside what their structure allows",
            episodes.get("hit_rate_points_off") if episodes.get("prompts") == PROMPTS else None,
            "points",
            at_most=HIT_POINTS_MAX,
        ),
    ]


# ---- a job beside a bare loop -----------------------------------------------------------


def measure_pairs(url: str, folder: Path, pairs: int) -> dict[str, Any]:
    """Seconds of both, alternately first; a pair before the others warms up and is left out."""
    loops_s: list[float] = []
    jobs_s: list[float] = []
    for number in range(pairs + 1):
        arms = [(loop_s, loops_s), (job_s, jobs_s)]
        for arm, (measure, found) in enumerate(arms if number % 2 else arms[::-1]):
            prompts = random_prompts(PAIR_REQUESTS, PAIR_PROMPT_TOKENS, 2 * number + arm)
            found.append(measure(url, folder / f"pair-{number}-{arm}", prompts))
    loops_s, jobs_s = loops_s[1:], jobs_s[1:]
    ratios = [job / loop for job, loop in zip(jobs_s, loops_s, strict=True)]
    return {
        "requests": PAIR_REQUESTS,
        "prompt_tokens": PAIR_PROMPT_TOKENS,
        "new_tokens": PAIR_NEW_TOKENS,
        "concurrency": CONCURRENCY,
        "loop_s": loops_s,
        "job_s": jobs_s,
        "ratios": ratios,
        "ratio_median": statistics.median(ratios),
    }


def random_prompts(count: int, tokens: int, seed: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(*VOCABULARY, (count, tokens)).tolist()


def loop_s(url: str, folder: Path, prompts: list[list[int]]) -> float:
    """Requests sent from a semaphore's worth of coroutines, and nothing else."""
    return asyncio.run(_loop_s(url, prompts))


async def _loop_s(url: str, prompts: list[list[int]]) -> float:
    slots = asyncio.Semaphore(CONCURRENCY)
    sampling = {"temperature": 0.0, "max_new_tokens": PAIR_NEW_TOKENS}
    begun_s = time.monotonic()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

        async def one(prompt: list[int]) -> None:
            body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
            async with slots, http.post(f"{url}/generate", json=body) as answer:
                text = await answer.text()
                if answer.status != 200:
                    raise MeasurementFailed(f"HTTP {answer.status}: {text[:300]}")

        await asyncio.gather(*map(one, prompts))
    return time.monotonic() - begun_s


def job_s(url: str, folder: Path, prompts: list[list[int]]) -> float:
    """A whole job in this process: rows read, samples written and sealed."""
    rows = [{"input_ids": prompt} for prompt in prompts]
    begun_s = time.monotonic()
    run_job(url, folder, rows, "--max-new-tokens", str(PAIR_NEW_TOKENS))
    return time.monotonic() - begun_s


def run_job(url: str, folder: Path, rows: list[dict[str, Any]], *flags: str) -> dict[str, Any]:
    """Its summary."""
    source = folder.with_suffix(".jsonl")
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = rollout(
        [
            *("--input", str(source), "--output", str(folder), "--endpoint", url, "--logprobs"),
            *("--concurrency", str(CONCURRENCY), "--temperature", "0", *flags),
        ]
    )
    if code:
        raise MeasurementFailed(f"the job into {folder} ended with exit code {code}")
    summary: dict[str, Any] = json.loads((folder / "_job" / "summary.json").read_text())
    return summary


# ---- the end of a job -------------------------------------------------------------------


def measure_orders(url: str, folder: Path) -> dict[str, Any]:
    """By order: the summary of a job whose few long prompts stand at the end of its input."""
    found = {}
    for seed, order in enumerate(ORDERS, 10**7):
        short = random_prompts(SHORT_PROMPTS, SHORT_TOKENS, seed)
        rows = [{"input_ids": p} for p in short + random_prompts(LONG_PROMPTS, LONG_TOKENS, seed)]
        flags = ("--order", order, "--max-new-tokens", str(PAIR_NEW_TOKENS))
        found[order] = run_job(url, folder / order, rows, *flags)
    return found


# ---- episodes of many turns -------------------------------------------------------------


def measure_episodes(url: str, folder: Path, prompts: int) -> dict[str, Any]:
    """One job of many samples and turns. It samples, since greedy samples of a prompt would be
    one and the same, and hits of each other."""
    ids = random_prompts(prompts, EPISODE_PROMPT_TOKENS, 10**6)
    rows = [{"input_ids": prompt, "say_seed": number} for number, prompt in enumerate(ids)]
    flags = ("--env", "benchmarks.rollout.turns:Turns", "--n", str(SAMPLES), "--temperature", "1")
    output = folder / "episodes"
    summary = run_job(url, output, rows, *flags, "--max-new-tokens", str(EPISODE_NEW_TOKENS))
    allowed = sum(allowed_tokens(turns) for turns in _turns(output))
    allowed_rate = allowed / summary["prompt_tokens"]
    return {
        "prompts": prompts,
        "samples": SAMPLES,
        "turns": TURNS,
        "concurrency": CONCURRENCY,
        "full_percent": 100 * summary["utilisation"]["full_share"],
        "hit_rate_percent": 100 * summary["hit_rate"],
        "hit_rate_allowed_percent": 100 * allowed_rate,
        "hit_rate_points_off": 100 * abs(allowed_rate - summary["hit_rate"]),
        "summary": summary,
    }


def allowed_tokens(turns: list[dict[str, Any]]) -> int:
    """Of one sample: tokens in full blocks whose KV exists when a turn begins. The last token
    of a prompt is always computed, the last generated one has no KV yet."""
    known = turns[0]["prompt_tokens"]  # computed for the first sample, before the others
    allowed = 0
    for turn in turns:
        reusable = min(known, turn["prompt_tokens"] - 1)
        allowed += reusable // PAGE_TOKENS * PAGE_TOKENS
        known = turn["prompt_tokens"] + turn["generated_tokens"] - 1
    return allowed


def _turns(output: Path) -> list[list[dict[str, Any]]]:
    shards = [pq.read_table(shard, columns=["turns"]) for shard in output.glob("*.parquet")]
    return [turns for shard in shards for turns in shard["turns"].to_pylist()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
