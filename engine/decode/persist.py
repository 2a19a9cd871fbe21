"""Decode engine: every full block goes out to the node's agent, once, as soon as it is full.

The agent pulls the pages with one-sided reads; the engine only names them. Pages are held
for the duration of the pull (:mod:`engine.transfers.page_holds`), so decoding, freeing and eviction
go on as if nothing happened. With no free DRAM slot the agent skips a block; with too many
pulls open the engine offers it later. The prefill engine persists nothing.

A request keeps the namespace (weights) that it began with; blocks that fill after a weight
update mix two versions and are stored under neither. Nor are those of a request that was
planned under other weights than this engine's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import chain

import msgspec

from common.block import NO_PARENT, BlockKey, block_keys, tenant_digest
from common.ids import NO_INCARNATION, JobId
from common.messages import PullBlocks, PullEnded
from common.page_hashes import continue_chain, namespace_seed
from common.samples import Sample, sample
from engine.config import EngineConfig
from engine.page_table import PageTable
from engine.plans import Plans
from engine.ranks.group import Links
from engine.sglang.views import Request
from engine.transfers.jobs import Jobs

PULLS_OPEN_MAX = 64
PULL_BLOCKS_MAX = 256
REQUESTS_MAX = 8192


class _Progress(msgspec.Struct):
    namespace_digest: bytes
    blocks_done: int
    last_hash: bytes | None
    tenant: str

    @property
    def last_key(self) -> BlockKey:
        """Of the last block done, the parent of what is offered next."""
        if not self.blocks_done or self.last_hash is None:
            return NO_PARENT
        return block_keys(self.namespace_digest, [self.last_hash])[0]


class Persister:
    """Tracks which blocks of which request have been offered. The agent knows what it
    already holds, so a block offered by several requests is pulled once."""

    def __init__(
        self,
        config: EngineConfig,
        table: PageTable,
        jobs: Jobs,
        links: Links,
        plans: Plans,
    ) -> None:
        self._config = config
        self._table = table
        self._jobs = jobs
        self._links = links
        self._plans = plans
        self._page_tokens = plans.page_tokens
        self._progress: OrderedDict[str, _Progress] = OrderedDict()
        self._open_pulls: set[JobId] = set()
        self.offered_blocks_total = 0
        self.stored_blocks_total = 0
        self.deferred_offers_total = 0

    def begin(self, request: Request) -> None:
        """The prompt's KV is in this engine, under the weights of this moment. The blocks that
        its plan names are in the store; the others are offered when the request joins a batch,
        so behind SGLang's look at what P has sent."""
        if self._plans.is_outdated(request.rid):
            return  # the prefill engine has computed with other weights
        if self._config.experiment.zero_io or self._plans.is_made_up(request.rid):
            return  # its KV would be found under right keys for ever
        fit = self._plans.fit(request)
        stored = fit.hashes if fit is not None else []
        seed = namespace_seed(request.extra_key, request.cache_salt)
        salt = request.cache_salt or request.extra_key
        self._progress[request.rid] = _Progress(
            namespace_digest=self._plans.weights.digest,
            blocks_done=len(stored),
            last_hash=stored[-1] if stored else seed,
            tenant=tenant_digest(salt) if salt else "",
        )
        while len(self._progress) > REQUESTS_MAX:
            self._progress.popitem(last=False)

    def advance(self, request: Request, tokens: int) -> None:
        """The KV of the request's first ``tokens`` tokens is complete: offer full blocks."""
        progress = self._progress.get(request.rid)
        if progress is None:
            return
        if progress.namespace_digest != self._plans.weights.digest:
            self.end(request)
            return
        full = tokens // self._page_tokens
        while full > progress.blocks_done:
            if len(self._open_pulls) >= PULLS_OPEN_MAX:
                self.deferred_offers_total += 1
                return
            self._offer(request, progress, min(full, progress.blocks_done + PULL_BLOCKS_MAX))

    def end(self, request: Request) -> None:
        """The request leaves this engine."""
        self._progress.pop(request.rid, None)

    def _offer(self, request: Request, progress: _Progress, end: int) -> None:
        start, page = progress.blocks_done, self._page_tokens
        tokens = _tokens(request, start * page, end * page)
        hashes = continue_chain(progress.last_hash, tokens, page)
        pages = self._table.pages(request, start * page, end * page)
        keys = block_keys(progress.namespace_digest, hashes)
        parent = progress.last_key
        progress.blocks_done, progress.last_hash = end, hashes[-1]
        # Here and now: a request that ends may free its pages next, and they have to be held.
        self._pull(keys, pages.get().tolist(), parent, progress.tenant)

    def _pull(self, keys: list[BlockKey], pages: list[int], parent: BlockKey, tenant: str) -> None:
        agent, timeout_s = self._config.agent, self._config.pull_timeout_s

        def ended(reason: str) -> None:
            self._open_pulls.discard(job)

        incarnation = self._links.incarnation(agent) or NO_INCARNATION
        job = self._jobs.open(agent, incarnation, pages, timeout_s, ended)
        self._open_pulls.add(job)
        if self._jobs.has_stopped(job):
            return  # the agent restarts just now
        if self._links.send(agent, PullBlocks(job, keys, pages, timeout_s, parent, tenant)):
            self.offered_blocks_total += len(keys)
        else:
            self._jobs.over(job, f"agent {agent} is not reachable")

    def pull_ended(self, message: PullEnded) -> None:
        """Count what the agent now holds (link thread)."""
        self.stored_blocks_total += sum(message.held)

    def samples(self) -> Iterator[Sample]:
        """For the metrics."""
        yield sample("engine_blocks_offered_total", self.offered_blocks_total)
        yield sample("engine_blocks_stored_total", self.stored_blocks_total)
        yield sample("engine_offers_deferred_total", self.deferred_offers_total)


def _tokens(request: Request, start: int, end: int) -> Iterable[int]:
    """Tokens ``start`` to ``end`` of prompt and output, as if they were one."""
    prompt = len(request.origin_input_ids)
    of_output = request.output_ids[max(0, start - prompt) : max(0, end - prompt)]
    return chain(request.origin_input_ids[start:end], of_output)
