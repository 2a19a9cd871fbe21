"""Sends the turns of a replay to one endpoint and notes what became of each."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import msgspec
import numpy as np

from benchmarks.trace import PAGE_TOKENS, SeenBlocks, Turn, possible_blocks
from launch.gateway.request.trace import HEADER

REQUEST_TIMEOUT_S = 600.0


class Outcome(msgspec.Struct):
    """One answered, or failed, request."""

    possible_blocks: int
    implied_blocks: int
    """Leading pages seen in requests that had completed when this one was sent."""
    cached_blocks: int = 0
    ttft_s: float = 0.0
    total_s: float = 0.0
    trace: dict[str, Any] = {}
    error: str = ""


async def replay(
    url: str,
    turns: Sequence[Turn],
    concurrency: int,
    speed: float,
    on_done: Callable[[Outcome], None],
) -> list[Outcome]:
    """Every turn in trace order, ``concurrency`` of them at once.

    A turn waits for the answer to its session's turn before, as its sender had to, and
    with ``speed`` > 0 for its time in the trace (from the first turn on, sped up so often).
    """
    seen = SeenBlocks()
    slots = asyncio.Semaphore(concurrency)
    last_of_session: dict[int, asyncio.Task[Outcome]] = {}
    tasks = []
    start_s = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    async with aiohttp.ClientSession(url, timeout=timeout, read_bufsize=2**22) as http:

        async def one(turn: Turn) -> Outcome:
            try:
                outcome = await _send(http, turn, seen)
            finally:
                slots.release()
            on_done(outcome)
            return outcome

        for turn in turns:
            if turn.session in last_of_session:
                await asyncio.wait([last_of_session[turn.session]])
            if speed > 0:
                due_s = start_s + (turn.timestamp_s - turns[0].timestamp_s) / speed
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            await slots.acquire()
            last_of_session[turn.session] = asyncio.create_task(one(turn))
            tasks.append(last_of_session[turn.session])
        return await asyncio.gather(*tasks)


async def _send(http: aiohttp.ClientSession, turn: Turn, seen: SeenBlocks) -> Outcome:
    outcome = Outcome(possible_blocks(len(turn.prompt)), seen.hit_blocks(turn.prompt))
    start_s = time.monotonic()
    body = {
        "input_ids": turn.prompt,
        "stream": True,
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": turn.output_tokens,
            "ignore_eos": True,
        },
    }
    try:
        async with http.post("/generate", json=body) as response:
            if response.status != 200:
                raise ReplayError(f"HTTP {response.status}: {(await response.text())[:300]}")
            outcome.trace = json.loads(response.headers.get(HEADER, "{}"))
            final = await _last_event(response, outcome, start_s)
    except (aiohttp.ClientError, TimeoutError, ReplayError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
        return outcome
    outcome.total_s = time.monotonic() - start_s
    outcome.cached_blocks = final["meta_info"]["cached_tokens"] // PAGE_TOKENS
    seen.completed(turn.prompt, final["output_ids"])
    return outcome


class ReplayError(Exception):
    """The endpoint answered, but not with a whole generation."""


async def _last_event(
    response: aiohttp.ClientResponse, outcome: Outcome, start_s: float
) -> dict[str, Any]:
    """Read the stream; events are cumulative, so the last one has all ids."""
    final: dict[str, Any] = {}
    async for line in response.content:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        event = json.loads(line[len(b"data: ") :])
        if "error" in event:
            raise ReplayError(str(event["error"])[:300])
        if not outcome.ttft_s:
            outcome.ttft_s = time.monotonic() - start_s
        final = event
    if not final.get("meta_info", {}).get("finish_reason"):
        raise ReplayError("the stream ended before the generation did")
    return final


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The figures of one replay. A failed request counts as one without hits or times."""
    answered = [o for o in outcomes if not o.error]
    possible = sum(o.possible_blocks for o in outcomes)
    implied = sum(o.implied_blocks for o in outcomes)
    cached = sum(o.cached_blocks for o in outcomes)
    ttft_s = [o.ttft_s for o in answered]
    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(answered),
        "errors": Counter(o.error for o in outcomes if o.error),
        "ttft_p50_s": _percentile(ttft_s, 50),
        "ttft_p95_s": _percentile(ttft_s, 95),
        "request_p50_s": _percentile([o.total_s for o in answered], 50),
        "blocks_possible": possible,
        "blocks_implied": implied,
        "blocks_cached": cached,
        "hit_rate_percent": 100 * cached / possible if possible else None,
        "hit_rate_implied_percent": 100 * implied / possible if possible else None,
        "readers": _readers(answered),
    }


def _readers(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """By agent: blocks that it brought, and bytes that it read by tier, over all requests."""
    blocks: Counter[str] = Counter()
    read_bytes: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        for agent, part in outcome.trace.get("readers", {}).items():
            blocks[agent] += part["blocks"]
            read_bytes[agent].update(part["read_bytes"])
    return {a: {"blocks": blocks[a], "read_bytes": dict(read_bytes[a])} for a in sorted(blocks)}


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None
