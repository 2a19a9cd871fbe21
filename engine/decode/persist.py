"""Decode engine: every full block goes out to the node's agent, once, as soon as it is full.

The agent pulls the pages with one-sided reads; the engine only names them. Pages are held
for the duration of the pull (:mod:`engine.transfers.page_holds`), so decoding, freeing and eviction
go on as if nothing happened. With no free DRAM slot the agent skips a block; with too many
pulls open the engine offers it later. The prefill engine persists nothing.

Where a model has windows in a pool of their own, a block's window goes with it, as far as the
next token attends there: what is before that may be gone, or not sent by the prefill engine.

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
from common.messages.from_agents import PullEnded
from common.messages.from_engines import PartPlaces, PullBlocks
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
    hashes: list[bytes]
    """Of the blocks done."""
    seed: bytes | None
    tenant: str
    found_blocks: int
    """The first ones, which the plan has found."""

    @property
    def blocks_done(self) -> int:
        return len(self.hashes)

    @property
    def last_hash(self) -> bytes | None:
        return self.hashes[-1] if self.hashes else self.seed

    @property
    def last_key(self) -> BlockKey:
        """Of the last block done, the parent of what is offered next."""
        return self.key_of(self.blocks_done) or NO_PARENT

    def key_of(self, blocks: int) -> BlockKey | None:
        """Of the last of so many blocks, if it is done."""
        if not 0 < blocks <= self.blocks_done:
            return None
        return block_keys(self.namespace_digest, [self.hashes[blocks - 1]])[0]


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
        is_on: bool = True,
    ) -> None:
        """While it is not ``is_on``, nothing is offered."""
        self._is_on = is_on
        self._config = config
        self._table = table
        self._jobs = jobs
        self._links = links
        self._plans = plans
        self._page_tokens = plans.page_tokens
        self._bigrams = plans.weights.namespace.layout.bigrams
        self._progress: OrderedDict[str, _Progress] = OrderedDict()
        self._open_pulls: dict[JobId, int] = {}
        """How many blocks each names."""
        self.offered_blocks_total = 0
        self.stored_blocks_total = 0
        self.deferred_offers_total = 0

    def begin(self, request: Request) -> None:
        """The prompt's KV is in this engine, under the weights of this moment. The blocks that
        its plan names are in the store; the others are offered when the request joins a batch,
        so behind SGLang's look at what P has sent."""
        if not self._is_on or self._plans.is_outdated(request.rid):
            return  # the prefill engine has computed with other weights
        if self._config.experiment.zero_io or self._plans.is_made_up(request.rid):
            return  # its KV would be found under right keys for ever
        if self._plans.keeps_nothing(request.rid):
            return
        fit = self._plans.fit(request)
        stored = list(fit.hashes) if fit is not None else []
        seed = namespace_seed(request.extra_key, request.cache_salt)
        salt = request.cache_salt or request.extra_key
        self._progress[request.rid] = _Progress(
            namespace_digest=self._plans.weights.digest,
            hashes=stored,
            seed=seed,
            tenant=tenant_digest(salt) if salt else "",
            found_blocks=len(stored),
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
        if self._bigrams:  # the next token is part of a key
            tokens = min(tokens, len(request.origin_input_ids) + len(request.output_ids) - 1)
        full = tokens // self._page_tokens
        while full > progress.blocks_done:
            if len(self._open_pulls) >= PULLS_OPEN_MAX:
                self.deferred_offers_total += 1
                return
            end = min(full, progress.blocks_done + PULL_BLOCKS_MAX)
            self._offer(request, progress, end, tokens)

    def key_at(self, request: Request, tokens: int) -> BlockKey | None:
        """Of the block with which the request's first ``tokens`` tokens end, if it was offered."""
        progress = self._progress.get(request.rid)
        if progress is None or tokens % self._page_tokens:
            return None
        return progress.key_of(tokens // self._page_tokens)

    def found_before(self, request: Request, tokens: int) -> list[BlockKey]:
        """Blocks that the request's plan has found, before that with which the first ``tokens``
        tokens end."""
        progress = self._progress.get(request.rid)
        if progress is None:
            return []
        blocks = min(progress.found_blocks, tokens // self._page_tokens - 1)
        return block_keys(progress.namespace_digest, progress.hashes[:blocks])

    def end(self, request: Request) -> None:
        """The request leaves this engine."""
        self._progress.pop(request.rid, None)

    def _offer(self, request: Request, progress: _Progress, end: int, tokens: int) -> None:
        start, page = progress.blocks_done, self._page_tokens
        of_blocks = _tokens(request, start * page, end * page + self._bigrams)
        hashes = continue_chain(progress.last_hash, of_blocks, page, self._bigrams)
        pages = self._table.pages(request, start * page, end * page)
        keys = block_keys(progress.namespace_digest, hashes)
        parent = progress.last_key
        progress.hashes += hashes
        parts = self._windows(request, keys, start, tokens)
        # Here and now: a request that ends may free its pages next, and they have to be held.
        self._pull(keys, pages.get().tolist(), parts, parent, progress.tenant)

    def _windows(
        self, request: Request, keys: list[BlockKey], start: int, tokens: int
    ) -> list[PartPlaces]:
        """Those that there are of blocks ``start ...``, of which these are the keys."""
        window, page = self._table.window, self._page_tokens
        if window is None:
            return []
        first = max(start, max(0, tokens - window.tokens) // page)
        end = start + len(keys)
        places = self._table.window_pages(request, first * page, end * page).get().tolist()
        there = [(keys[first - start + n], place) for n, place in enumerate(places) if place]
        return [PartPlaces([key for key, _ in there], [place for _, place in there])]

    def _pull(
        self,
        keys: list[BlockKey],
        pages: list[int],
        parts: list[PartPlaces],
        parent: BlockKey,
        tenant: str,
    ) -> None:
        agent, timeout_s = self._config.agent, self._config.pull_timeout_s

        def ended(reason: str) -> None:
            self._open_pulls.pop(job, None)

        incarnation = self._links.incarnation(agent) or NO_INCARNATION
        job = self._jobs.open(agent, incarnation, (), timeout_s, ended)
        self._jobs.hold(job, pages, [part.places for part in parts])
        self._open_pulls[job] = len(keys)
        if self._jobs.has_stopped(job):
            return  # the agent restarts just now
        message = PullBlocks(job, keys, pages, timeout_s, parent, tenant, parts)
        if self._links.send(agent, message):
            self.offered_blocks_total += len(keys)
        else:
            self._jobs.over(job, f"agent {agent} is not reachable")

    def pull_ended(self, message: PullEnded) -> None:
        """Count the blocks that the agent now holds (link thread)."""
        blocks = self._open_pulls.get(message.job, 0)
        self.stored_blocks_total += sum(message.held[:blocks])

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
