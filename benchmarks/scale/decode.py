"""What a decode engine's scheduler thread pays for persistence, beside SGLang's own work.

SGLang's requests, its table of rows and its allocator are real, on a CPU; so are the hooks on them
and all that these call. What would go to the agent is encoded, and its answer is made up.
"""

from __future__ import annotations

import time
from array import array
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import torch

from benchmarks.scale.demand import DECODE_BATCH
from benchmarks.scheduler.cluster import PAGE_TOKENS
from common.block import BlockLayout, Namespace
from common.ids import Incarnation, JobId
from common.messages.codec import Message, encode
from common.messages.from_engines import PullBlocks, RegisterEngine
from engine.config import EngineConfig
from engine.decode.persist import Persister
from engine.page_table import PageTable
from engine.plans import Plans
from engine.runtime import EngineRuntime, set_runtime
from engine.transfers.jobs import Jobs
from engine.transfers.page_holds import PageHolds
from engine.weights import Weights

CONTEXT_TOKENS = 64 * 1024
SPARE_TOKENS = 8 * PAGE_TOKENS
"""That a request may still generate."""
HELD_PAGES = 4096
"""Of deliveries under way."""


class _Links:
    """Keeps the pulls that were sent, until they are ended."""

    def __init__(self) -> None:
        self.pulls: list[JobId] = []

    def send(self, agent: str, message: Message) -> bool:
        encode(message)
        if isinstance(message, PullBlocks):
            self.pulls.append(message.job)
        return True

    def incarnation(self, agent: str) -> Incarnation:
        return Incarnation(1)

    def host(self, agent: str) -> str:
        return ""

    def set_hello(self, hello: RegisterEngine) -> None:
        """There are no agents."""


class DecodeCosts(msgspec.Struct, frozen=True):
    """CPU seconds of the scheduler's thread."""

    block_s: float
    """For each block that is full, its pull's end included; medians over the rounds."""
    step_s: float
    """For a step of a full batch, all that is asked in each of them."""


class DecodeBench:
    """An engine at work on ``DECODE_BATCH`` requests of 64K tokens."""

    def __init__(self) -> None:
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

        pages = (CONTEXT_TOKENS + SPARE_TOKENS) // PAGE_TOKENS
        size = (2 * HELD_PAGES + pages) * PAGE_TOKENS
        # As an engine builds it, but for the pool, of which nothing is asked.
        self.allocator = cast(Any, PagedTokenToKVPoolAllocator)(
            size, PAGE_TOKENS, torch.bfloat16, "cpu", None, False
        )
        table = ReqToTokenPool(DECODE_BATCH, CONTEXT_TOKENS + SPARE_TOKENS, "cpu", False)
        self.links = _Links()
        weights = Weights(Namespace("m", "1", "bfloat16", BlockLayout(PAGE_TOKENS, 61, (73728,))))
        plans = Plans(weights, PAGE_TOKENS)
        self.holds = PageHolds(self.allocator)
        self.jobs = Jobs(Incarnation(1), self.holds)
        config = EngineConfig(name="d0", role="decode", controls=[], agent="a", agents={})
        persister = Persister(
            config, PageTable(table.req_to_token, PAGE_TOKENS), self.jobs, self.links, plans
        )
        runtime = SimpleNamespace(persister=persister, holds=self.holds, jobs=self.jobs)
        set_runtime(cast(EngineRuntime, runtime))
        self.batch = SimpleNamespace(reqs=self._requests(table))
        for request in self.batch.reqs:
            persister.begin(request)
            persister.advance(request, CONTEXT_TOKENS)  # the prompts, once for all
            self.end_pulls()
        held = self.jobs.open("a", Incarnation(1), range(1, HELD_PAGES + 1), 600.0, _ended)
        assert len(self.holds.held_pages()) == HELD_PAGES and held

    def _requests(self, table: Any) -> list[Any]:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        prompt = array("I", np.random.default_rng(0).integers(0, 1 << 17, CONTEXT_TOKENS).tolist())
        first = PAGE_TOKENS * (HELD_PAGES + 1)
        rows = torch.arange(first, first + CONTEXT_TOKENS + SPARE_TOKENS, dtype=torch.int32)
        requests = []
        for n in range(DECODE_BATCH):
            # A salt of its own: no block is another's. Phases differ, as those of real requests.
            request = Req(str(n), "", prompt, SamplingParams(max_new_tokens=1 << 20))
            request.cache_salt = str(n)
            request.kv = cast(Any, SimpleNamespace(req_pool_idx=n + 1))
            table.req_to_token[n + 1] = rows
            requests.append(request)
        return requests

    def step(self) -> None:
        """As SGLang's loop: results are taken, and what comes next is admitted."""
        from engine.sglang import pool_hooks
        from engine.sglang.decode import persist_hooks

        persist_hooks.after_batch_result(None, None, self.batch)
        pool_hooks.before_available_size(self.allocator)
        _ = self.holds.unevictable_tokens

    def end_pulls(self) -> int:
        """The agent says that it has them; how many."""
        ended, self.links.pulls = self.links.pulls, []
        for job in ended:
            self.jobs.over(job)
        return len(ended)


def _ended(reason: str) -> None:
    """Of no job that is asked about."""


def measure(rounds: int) -> DecodeCosts:
    """Each round: all requests fill a block, one after the other as their phases differ."""
    bench = DecodeBench()
    requests = bench.batch.reqs
    for n, request in enumerate(requests):
        request.output_ids.extend([7] * (n % PAGE_TOKENS))
    bench.step()
    idle_s, full_s = [], []
    for _ in range(rounds):
        for _ in range(PAGE_TOKENS):
            for request in requests:
                request.output_ids.append(7)
            begun_s = time.thread_time()
            bench.step()
            blocks = bench.end_pulls()
            full_s.append((time.thread_time() - begun_s, blocks))
            begun_s = time.thread_time()
            bench.step()  # nothing is full any more
            idle_s.append(time.thread_time() - begun_s)
    idle = float(np.median(idle_s))
    some = [(spent_s - idle) / blocks for spent_s, blocks in full_s if blocks]
    return DecodeCosts(
        block_s=float(np.median(some)), step_s=float(np.median([each for each, _ in full_s]))
    )
