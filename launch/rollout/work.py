"""What to do next: rows in the job's order, tokenised ahead, their samples as one group.

The samples of a prompt share its KV. Sent all at once, none would find it: so the prompt is
first sent alone for one token (*primed*), and its samples follow as hits. So that slots are
not empty while prompts are primed, as many samples as slots are kept ready.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator

import msgspec
import numpy as np
from numpy.typing import NDArray

from launch.rollout.config import RolloutConfig
from launch.rollout.errors import RequestFailed
from launch.rollout.groups.gathering import Gathering
from launch.rollout.groups.group import Group
from launch.rollout.input.prompt_table import PromptTable
from launch.rollout.input.rows import BadRow, Prompt
from launch.rollout.input.sampling import sampling_of
from launch.rollout.output.schema import Sample
from launch.rollout.output.shards import Output
from launch.rollout.token_ids import TokenIds

SHARED_TOKENS_MIN = 65
"""Shorter prompts have no full block of 64 tokens that is not also the last one's."""
AHEAD_ROWS = 16
"""Rows that are tokenised before their turn."""


class Prime(msgspec.Struct):
    """Send this prompt alone."""

    group: Group


class Draw(msgspec.Struct):
    """Run one episode."""

    group: Group
    sample: int


def row_order(config: RolloutConfig, table: PromptTable) -> NDArray[np.int64]:
    """Row numbers in the order in which they start."""
    if config.order == "longest-first":
        return np.argsort(-table.lengths().astype(np.int64), kind="stable")
    numbers = np.arange(table.rows)
    if config.order == "shuffled":
        np.random.default_rng(config.seed or 0).shuffle(numbers)
    return numbers


class Source:
    """Groups of all rows that lack samples; those first that an earlier run has begun."""

    def __init__(
        self, config: RolloutConfig, table: PromptTable, output: Output, token_ids: TokenIds
    ) -> None:
        self._table = table
        self._token_ids = token_ids
        self._output = output
        self._config = config
        begun = output.kept.rows()
        order = row_order(config, table)
        self._order = np.concatenate(
            [order[np.isin(order, begun)], order[np.isin(order, begun, invert=True)]]
        )

    async def groups(self) -> AsyncGenerator[Group, None]:
        """Tokenised up to ``AHEAD_ROWS`` ahead."""
        numbers = self._unfinished()
        ahead: deque[asyncio.Task[Group]] = deque()
        try:
            while True:
                while len(ahead) < AHEAD_ROWS and (number := next(numbers, None)) is not None:
                    ahead.append(asyncio.create_task(self._group(number)))
                if not ahead:
                    return
                yield await ahead[0]
                ahead.popleft()
        finally:
            for task in ahead:
                task.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)

    def draws(self) -> int:
        """Episodes that all groups have at most, whole ones of earlier runs aside."""
        done = self._output.done
        extra = self._config.oversample_samples * int((~done.all(axis=1)).sum())
        return int((~done).sum()) + extra - self._output.kept.whole

    def _unfinished(self) -> Iterator[int]:
        done = self._output.done
        return (int(number) for number in self._order if not done[number].all())

    async def _group(self, number: int) -> Group:
        done = self._output.done[number]
        wanted = np.flatnonzero(~done).tolist()
        group = Group(number, str(number), wanted, None)
        try:
            row = self._table.row(number)
            group.id = row.id
            prompt = group.prompt = Prompt(number, row, await self._token_ids.prompt(row))
        except (BadRow, RequestFailed) as error:
            group.reason = str(error)
            return group
        kept = self._output.kept.of(number)
        group.whole = [sample for sample in kept if sample.is_whole][: len(wanted)]
        group.begun = {s.sample: s for s in kept if self._goes_on(s, prompt)}
        if not group.is_whole:
            ended = {sample.sample for sample in kept if sample.is_whole}
            extra = self._config.oversample_samples
            numbers = [*wanted, *range(len(done), len(done) + extra)]
            drawn = [number for number in numbers if number not in ended]
            group.drawn = sorted(drawn, key=lambda number: number not in group.begun)
        return group

    def _goes_on(self, sample: Sample, prompt: Prompt) -> bool:
        """Whether a kept sample is unfinished, and would be begun now as it was."""
        config = self._config
        is_alike = bool(sample.logprobs) == config.logprobs and not config.env
        sampling = sampling_of(config, prompt, sample.sample)
        return not sample.is_whole and is_alike and sample.sampling == sampling


class Work:
    """Deals out what to send next. One consumer."""

    def __init__(self, source: AsyncIterator[Group], ready_min: int, gathering: Gathering) -> None:
        self._source = source
        self._ready_min = ready_min
        self._gathering = gathering
        gathering.on_change = self._wake
        self._ready: deque[Draw] = deque()
        self._priming = 0
        self._changed = asyncio.Event()
        self._ended = False

    async def next(self) -> Prime | Draw | Group | None:
        """None once everything has been dealt out, or nothing more is needed. A group that is whole
        already, or that cannot be sampled, comes as it is."""
        while not self._gathering.is_over:
            self._changed.clear()
            may_open = not self._ended and self._gathering.may_open
            if may_open and len(self._ready) < self._ready_min:
                work = await self._open_group()
                if work is not None:
                    return work
            elif self._ready:
                return self._ready.popleft()
            elif self._priming or not self._ended:
                await self._changed.wait()
            else:
                return None
        return None

    def primed(self, group: Group) -> None:
        """Its prompt has been computed, or could not be: each sample then finds out."""
        self._priming -= 1
        self._make_ready(group)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()

    async def _open_group(self) -> Prime | Group | None:
        group = await anext(self._source, None)
        if group is None:
            self._ended = True
            return None
        if group.prompt is None:
            return group
        self._gathering.opened(group)
        if group.is_whole:
            return group
        if len(group.drawn) > 1 and len(group.prompt.token_ids) >= SHARED_TOKENS_MIN:
            self._priming += 1
            return Prime(group)
        self._make_ready(group)
        return None

    def _make_ready(self, group: Group) -> None:
        self._ready += [Draw(group, sample) for sample in group.drawn]
