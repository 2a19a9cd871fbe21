"""Agents in the paper's shape, scaled down, and one job of them against a cluster.

Every turn's prompt is fixed beforehand (a *trajectory*: the context, then what was appended and
answered), as in the paper's replay, so each arm computes, reads and writes the same, whatever
its outputs. A job's blocks are under a ``cache_salt`` of its own, so no arm finds what another
has stored.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from benchmarks.testbed.cluster import BLOCK_BYTES, Gateway
from launch.cluster.layout import PAGE_TOKENS

TOKEN_FIRST, TOKEN_LAST = 300, 2000
"""Ordinary words of any vocabulary, with no special token among them."""


class AgentShape(msgspec.Struct, frozen=True):
    """The paper's 64K trace (arXiv 2602.21548: 157 turns, mean context 32,721, appended 429,
    generated 176, 98.7 % hits) with every length divided by 14, and only a few turns from the
    middle of a trajectory."""

    turns: int = 3
    context_tokens: int = 2304
    """Whole blocks, stored before the job begins."""
    append_tokens: int = 31
    generate_tokens: int = 13


class Trajectories:
    """What each of ``agents`` says, and, once known, what it is answered."""

    def __init__(self, agents: int, shape: AgentShape) -> None:
        self.agents = agents
        self.shape = shape
        words = np.random.default_rng(0xD0A1)

        def random(*size: int) -> list[Any]:
            found: list[Any] = words.integers(TOKEN_FIRST, TOKEN_LAST, size).tolist()
            return found

        self.contexts: list[list[int]] = random(agents, shape.context_tokens)
        self._appended: list[list[list[int]]] = random(agents, shape.turns, shape.append_tokens)
        self.answers: list[list[list[int]]] = [[] for _ in range(agents)]
        """By agent and turn; filled by the job that makes the reference."""

    def prompt(self, agent: int, turn: int) -> list[int]:
        """Needs the answers to the turns before."""
        prompt = list(self.contexts[agent])
        for before in range(turn):
            prompt += self._appended[agent][before] + self.answers[agent][before]
        return prompt + self._appended[agent][turn]


class Turn(msgspec.Struct):
    """One answered request. Times are seconds of the monotonic clock."""

    agent: int
    turn: int
    sent_s: float
    done_s: float
    prompt_tokens: int
    hit_bytes: int
    read_bytes: int
    """Of the hit, from the remote store."""
    output: list[int]
    trace: dict[str, Any]


class Job(msgspec.Struct):
    """All turns of all agents."""

    begun_s: float
    ended_s: float
    turns: list[Turn]

    @property
    def seconds(self) -> float:
        return self.ended_s - self.begun_s

    @property
    def hit_bytes(self) -> int:
        return sum(turn.hit_bytes for turn in self.turns)

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that came from the store."""
        tokens = sum(turn.prompt_tokens for turn in self.turns)
        return self.hit_bytes / BLOCK_BYTES * PAGE_TOKENS / tokens

    def differing(self, reference: Sequence[Sequence[list[int]]]) -> int:
        """Answers that are not the reference's."""
        return sum(turn.output != reference[turn.agent][turn.turn] for turn in self.turns)


async def store_contexts(gateway: Gateway, prompts: Sequence[list[int]], salt: str) -> None:
    """Have the cluster compute and store these prompts' KV; returns when it is durable."""
    await asyncio.gather(*(ask(gateway, prompt, 1, salt) for prompt in prompts))
    await gateway.wait_stored()


async def run_job(gateway: Gateway, work: Trajectories, salt: str) -> Job:
    """Every agent at once, each turn as soon as the one before is answered.

    A turn without an answer yet gets this one: the first job makes the reference.
    """
    begun_s = time.monotonic()
    agents = (_run_agent(gateway, work, agent, salt) for agent in range(work.agents))
    turns = [turn for turns in await asyncio.gather(*agents) for turn in turns]
    return Job(begun_s, time.monotonic(), turns)


async def _run_agent(gateway: Gateway, work: Trajectories, agent: int, salt: str) -> list[Turn]:
    turns = []
    for number in range(work.shape.turns):
        prompt, sent_s = work.prompt(agent, number), time.monotonic()
        output, trace = await ask(gateway, prompt, work.shape.generate_tokens, salt)
        if number == len(work.answers[agent]):
            work.answers[agent].append(output)
        read_bytes = sum(part["read_bytes"].get("remote", 0) for part in trace["readers"].values())
        turns.append(
            Turn(
                agent=agent,
                turn=number,
                sent_s=sent_s,
                done_s=time.monotonic(),
                prompt_tokens=len(prompt),
                hit_bytes=trace["hit_blocks"] * BLOCK_BYTES,
                read_bytes=read_bytes,
                output=output,
                trace=trace,
            )
        )
    return turns


async def deliver_once(gateway: Gateway, prompt: list[int], salt: str) -> float:
    """Seconds from the plan of one request, alone, to the last byte of its hit in both engines."""
    _, trace = await ask(gateway, prompt, 1, salt)
    timings_s: dict[str, float] = trace["timings_s"]
    return timings_s["read"] + timings_s["deliver"]


async def ask(
    gateway: Gateway, prompt: list[int], new_tokens: int, salt: str
) -> tuple[list[int], dict[str, Any]]:
    """Tokens and trace of one greedy answer; raises ``ClusterFailed``."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "cache_salt": salt}
    answer, trace = await gateway.generate(body)
    return answer["output_ids"], trace
