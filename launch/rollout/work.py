"""What to do next: rows in the job's order, tokenised ahead, their samples as one group.

The samples of a prompt share its KV. Sent all at once, none would find it: so the prompt is
first sent alone for one token (*primed*), and its samples follow as hits. So that slots are
not empty while prompts are primed, as many samples as slots are kept ready.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

import msgspec
import numpy as np
from numpy.typing import NDArray

from launch.rollout.config import RolloutConfig
from launch.rollout.episode import Prompt
from launch.rollout.errors import RequestFailed
from launch.rollout.input.prompt_table import PromptTable
from launch.rollout.input.rows import BadRow
from launch.rollout.token_ids import TokenIds

SHARED_TOKENS_MIN = 65
"""Shorter prompts have no full block of 64 tokens that is not also the last one's."""
AHEAD_ROWS = 16
"""Rows that are tokenised before their turn."""


class Group(msgspec.Struct):
    """The missing samples of one row, or why it has none."""

    number: int
    id: str
    samples: list[int]
    prompt: Prompt | None
    reason: str = ""


class Prime(msgspec.Struct):
    """Send this prompt alone."""

    group: Group


class Draw(msgspec.Struct):
    """Run one episode."""

    prompt: Prompt
    sample: int


def row_order(config: RolloutConfig, table: PromptTable) -> NDArray[np.int64]:
    """Row numbers in the order in which they start."""
    if config.order == "longest-first":
        return np.argsort(-table.lengths().astype(np.int64), kind="stable")
    numbers = np.arange(table.rows)
    if config.order == "shuffled":
        np.random.default_rng(config.seed or 0).shuffle(numbers)
    return numbers


async def groups(
    order: NDArray[np.int64], done: NDArray[np.bool_], table: PromptTable, token_ids: TokenIds
) -> AsyncGenerator[Group, None]:
    """One for each row that lacks samples, tokenised up to ``AHEAD_ROWS`` ahead."""
    numbers = _unfinished(order, done)
    ahead: deque[asyncio.Task[Group]] = deque()
    try:
        while True:
            while len(ahead) < AHEAD_ROWS and (number := next(numbers, None)) is not None:
                missing = np.flatnonzero(~done[number]).tolist()
                ahead.append(asyncio.create_task(_group(number, missing, table, token_ids)))
            if not ahead:
                return
            yield await ahead[0]
            ahead.popleft()
    finally:
        for task in ahead:
            task.cancel()
        await asyncio.gather(*ahead, return_exceptions=True)


def _unfinished(order: NDArray[np.int64], done: NDArray[np.bool_]) -> Iterator[int]:
    return (int(number) for number in order if not done[number].all())


async def _group(number: int, samples: list[int], table: PromptTable, token_ids: TokenIds) -> Group:
    row_id = str(number)
    try:
        row = table.row(number)
        row_id = row.id
        prompt = Prompt(number, row, await token_ids.prompt(row))
    except (BadRow, RequestFailed) as error:
        return Group(number, row_id, samples, None, str(error))
    return Group(number, row_id, samples, prompt)


class Work:
    """Deals out what to send next. One consumer."""

    def __init__(
        self, source: AsyncIterator[Group], ready_min: int, on_bad: Callable[[Group], None]
    ) -> None:
        """``on_bad`` gets the rows that cannot be sampled."""
        self._source = source
        self._on_bad = on_bad
        self._ready_min = ready_min
        self._ready: deque[Draw] = deque()
        self._priming = 0
        self._primed = asyncio.Event()
        self._ended = False

    async def next(self) -> Prime | Draw | None:
        """None once everything has been dealt out."""
        while True:
            if not self._ended and len(self._ready) < self._ready_min:
                prime = await self._open_group()
                if prime is not None:
                    return prime
            elif self._ready:
                return self._ready.popleft()
            elif self._priming:
                self._primed.clear()
                await self._primed.wait()
            else:
                return None

    def primed(self, group: Group) -> None:
        """Its prompt has been computed, or could not be: each sample then finds out."""
        self._priming -= 1
        self._make_ready(group)
        self._primed.set()

    async def _open_group(self) -> Prime | None:
        group = await anext(self._source, None)
        if group is None:
            self._ended = True
        elif group.prompt is None:
            self._on_bad(group)
        elif len(group.samples) > 1 and len(group.prompt.token_ids) >= SHARED_TOKENS_MIN:
            self._priming += 1
            return Prime(group)
        else:
            self._make_ready(group)
        return None

    def _make_ready(self, group: Group) -> None:
        assert group.prompt is not None
        self._ready += [Draw(group.prompt, sample) for sample in group.samples]
