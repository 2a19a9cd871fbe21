"""All that one family is asked, and what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from benchmarks.models import conversations, exchange
from benchmarks.models.cluster import Answer, Cluster, ask, beside, running, session
from benchmarks.models.conversations import Conversation
from benchmarks.models.exchange import KV, Kind
from benchmarks.models.families import Family
from benchmarks.own_cluster import free_port
from benchmarks.plain_sglang import plain_sglang
from common.block import BlockLayout
from launch.cluster.layout import page_tokens
from launch.models.resolve import resolve_model

POLICIES = ("prefill", "decode", "split", "n-way")
COLD, FLUSHED, SSD, REMOTE, KILLED = "cold", "flushed", "ssd", "remote", "reader killed"
AT_ONCE = 5
"""Requests of the cluster; the plain server has one."""
CONTROL_PROMPTS = 3
COMPUTED_MAX = 64
"""Tokens behind the hit of a control's prompt: with more it hardly looks at a window there."""
PLAIN_POOL_TOKENS = 16384
_PLAIN_PORT_APART = 600
"""From the cluster's own ports, which are looked for at the same time."""


class Asked(msgspec.Struct):
    """One request of the cluster beside the plain server's."""

    what: str
    policy: str
    conversation: int
    turn: int
    prompt_tokens: int
    right: bool
    cached_tokens: int
    longest_tokens: int
    """The longest hit that there could have been: of what turns before have left. 0 of a first
    one."""
    read_bytes: int = 0
    needed_bytes: int = 0
    """Of parts that no agent had in DRAM, as far as the hit went."""
    accepted: float = 0.0
    """Tokens for each that the model was asked for; 0 without a draft."""
    accepted_plain: float = 0.0
    margin: float | None = None
    """Of another token than the plain server's, the first one: by how much that was likelier there
    than the next best. A small one is rounding, not a fault."""


class Control(msgspec.Struct):
    """What was exchanged, and how many answers it changed."""

    kind: str
    objects: int
    asked: int = 0
    hits: int = 0
    differ: int = 0
    faint: bool = False
    """Not every answer can show it: one has to."""
    accepted: float = 0.0
    accepted_plain: float = 0.0


class Measured(msgspec.Struct):
    """Of one family."""

    asked: list[Asked] = []
    controls: list[Control] = []
    readers_killed: int = 0
    object_bytes: dict[str, int] = {}
    """Of each part; of blocks under the empty name."""
    has_draft: bool = False
    steps_s: dict[str, float] = {}


Plain = dict[tuple[int, ...], Answer]


class Walk:
    """One family's requests, over every path."""

    def __init__(
        self, family: Family, talks: Sequence[Conversation], plain: Plain, cluster: Cluster
    ) -> None:
        self.measured = Measured(has_draft=family.has_draft)
        self._family, self._talks, self._plain, self._cluster = family, talks, plain, cluster
        self._page_tokens = page_tokens(resolve_model(family.model))
        self._layouts: dict[str, BlockLayout] = {}
        self._in_dram: set[tuple[int, str, int]] = set()

    async def run(self, on_step: Callable[[str], None]) -> None:
        cluster = self._cluster
        turns = range(len(self._talks[0]))
        on_step(COLD)
        for turn in turns:
            await self._ask_all(COLD, turn, ["n-way"])
            await cluster.wait_stored()
        self._layouts = exchange.layouts(cluster.remote)
        self.measured.object_bytes = {
            part: layout.block_bytes for part, layout in self._layouts.items()
        }
        for policy in POLICIES:
            on_step(f"{FLUSHED}, {policy}")
            for turn in turns:
                await self._ask_all(FLUSHED, turn, [policy])
        await cluster.wait_stored()
        for what, meanwhile in ((SSD, lambda: None), (REMOTE, cluster.clear_ssd)):
            on_step(what)
            await self._restart(meanwhile)
            for turn in turns:
                await self._ask_all(what, turn, POLICIES)
            await cluster.wait_stored()
        on_step(KILLED)
        for policy in ("prefill", "decode"):
            await self._kill_reader(policy)
        await self._run_controls(on_step)

    async def _ask_all(self, what: str, turn: int, policies: Sequence[str]) -> None:
        """Some conversations at once; nothing of them is in an engine. Each has its policy in all
        turns: by another one a block that an agent has may be another's to read."""
        await self._cluster.flush()
        for index, policy in enumerate(policies):
            await self._cluster.set_policy(policy)
            numbers = range(index, len(self._talks), len(policies))
            for first in range(0, len(numbers), AT_ONCE):
                some = numbers[first : first + AT_ONCE]
                await asyncio.gather(*(self._ask(what, n, turn, policy) for n in some))

    async def _ask(self, what: str, number: int, turn: int, policy: str) -> None:
        prompt = self._talks[number][turn]
        right = self._plain[tuple(prompt)]
        answer = await self._cluster.ask(prompt, self._family.new_tokens)
        asked = Asked(
            what,
            policy,
            number,
            turn,
            len(prompt),
            answer.tokens == right.tokens,
            answer.cached_tokens,
            self._longest_tokens(number, turn),
            accepted=accepted(answer),
            accepted_plain=accepted(right),
            margin=margin_of(answer, right),
        )
        if what in (SSD, REMOTE):
            asked.read_bytes = answer.read_bytes
            asked.needed_bytes = self._needed_bytes(number, answer.cached_tokens)
        self.measured.asked.append(asked)

    def _longest_tokens(self, number: int, turn: int) -> int:
        """KV of the last token of an answer is never computed."""
        if turn == 0:
            return 0
        computed = len(self._talks[number][turn - 1]) + self._family.new_tokens - 1
        reusable = min(computed, len(self._talks[number][turn]) - 1)
        return reusable // self._page_tokens * self._page_tokens

    def _needed_bytes(self, number: int, hit_tokens: int) -> int:
        """Of objects that a hit needs, and that no hit since the agents' start has needed."""
        blocks = hit_tokens // self._page_tokens
        needed = {(number, KV, block) for block in range(blocks)}
        for part in filter(None, self._layouts):
            span = self._family.spans[exchange.group_of(part)]
            needed |= {(number, part, block) for block in range(max(0, blocks - span), blocks)}
        new = needed - self._in_dram
        self._in_dram |= new
        return sum(self._layouts[part].block_bytes for _, part, _ in new)

    async def _restart(self, meanwhile: Callable[[], None]) -> None:
        await self._cluster.kill_agents(meanwhile)
        self._in_dram.clear()

    async def _kill_reader(self, policy: str) -> None:
        """It ends itself in the middle of a delivery of the longest hit."""
        cluster, last = self._cluster, len(self._talks[0]) - 1
        longest = max(range(len(self._talks)), key=lambda number: len(self._talks[number][last]))
        await cluster.flush()
        before = await cluster.agents()
        await cluster.set_policy(policy)
        cluster.crash_file.touch()
        await self._ask(KILLED, longest, last, policy)
        if cluster.crash_file.exists():
            cluster.crash_file.unlink()
            return
        await cluster.wait_restarted(before, 1)
        self.measured.readers_killed += 1

    async def _run_controls(self, on_step: Callable[[str], None]) -> None:
        cluster = self._cluster
        await cluster.wait_stored()
        pristine = cluster.remote.with_name("pristine")
        shutil.copytree(cluster.remote, pristine)
        for kind in exchange.kinds_of(self._layouts):
            on_step(f"control {kind.name}")
            changed = 0

            def spoil(kind: Kind = kind) -> None:
                nonlocal changed
                cluster.clear_ssd()
                shutil.rmtree(cluster.remote)
                shutil.copytree(pristine, cluster.remote)
                changed = exchange.exchange(cluster.remote, kind)

            await self._restart(spoil)
            await self._see(Control(kind.name, changed, faint=kind.name in self._family.faint))

    async def _see(self, control: Control) -> None:
        prompts = by_what_they_show((talk[-1] for talk in self._talks), self._page_tokens)
        await self._cluster.flush()
        for prompt in prompts if control.faint else prompts[:CONTROL_PROMPTS]:
            right = self._plain[tuple(prompt)]
            answer = await self._cluster.ask(prompt, self._family.new_tokens)
            control.asked += 1
            control.hits += answer.cached_tokens > 0
            control.differ += answer.tokens != right.tokens
            control.accepted += accepted(answer)
            control.accepted_plain += accepted(right)
        self.measured.controls.append(control)


def by_what_they_show(prompts: Iterable[list[int]], page_tokens: int) -> list[list[int]]:
    """The long ones first, and before them those of which little is computed behind the hit."""
    return sorted(prompts, key=lambda p: ((len(p) - 1) % page_tokens >= COMPUTED_MAX, -len(p)))


def accepted(answer: Answer) -> float:
    return len(answer.tokens) / answer.verifies if answer.verifies else 0.0


def margin_of(answer: Answer, right: Answer) -> float | None:
    """At the first token that is another; None where none is, or nobody knows."""
    pairs = zip(answer.tokens, right.tokens, right.margins, strict=False)
    return next((margin for token, other, margin in pairs if token != other), None)


async def measure(
    family: Family, prompts: int, folder: Path, on_step: Callable[[str], None]
) -> Measured:
    """Raises :class:`ClusterFailed`."""
    steps = _Steps(on_step)
    steps.begin("start")
    flags = [*family.engines, *family.plain, "--max-total-tokens", str(PLAIN_POOL_TOKENS)]
    port, log = free_port() + _PLAIN_PORT_APART, folder.with_suffix(".plain.log")
    plain_server = plain_sglang(resolve_model(family.model), port, log, *flags)
    async with contextlib.AsyncExitStack() as stack:
        served = await stack.enter_async_context(beside(plain_server))
        async with running(family, folder) as cluster:
            url = await asyncio.to_thread(served)
            steps.begin("plain")
            talks, plain = await _right_answers(url, family, prompts)
            await stack.aclose()
            walk = Walk(family, talks, plain, cluster)
            await walk.run(steps.begin)
            steps.begin("end")
    walk.measured.steps_s = steps.ended()
    return walk.measured


class _Steps:
    """How long each took."""

    def __init__(self, on_step: Callable[[str], None]) -> None:
        self._on_step = on_step
        self._begun: dict[str, float] = {}

    def begin(self, name: str) -> None:
        self._begun[name] = time.monotonic()
        self._on_step(name)

    def ended(self) -> dict[str, float]:
        times = [*self._begun.values(), time.monotonic()]
        spans = (end - start for start, end in itertools.pairwise(times))
        return {name: round(seconds, 1) for name, seconds in zip(self._begun, spans, strict=True)}


async def _right_answers(
    url: str, family: Family, prompts: int
) -> tuple[list[Conversation], Plain]:
    """Of a plain server, which computes each prompt from its beginning."""
    known: Plain = {}
    async with session() as http:

        async def answer(prompt: list[int]) -> list[int] | None:
            await http.post(f"{url}/flush_cache")
            asked = ask(http, url, prompt, family.new_tokens, margins=not family.has_draft)
            found = await asked
            if min(found.margins, default=0.0) < family.margin_min:
                return None
            known[tuple(prompt)] = found
            return found.tokens

        page = page_tokens(resolve_model(family.model))
        return await conversations.converse(prompts, answer, page), known
