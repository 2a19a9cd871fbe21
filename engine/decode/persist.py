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
from collections.abc import Callable
from itertools import chain, islice
from typing import Any

import msgspec
import torch

from common.block import NO_PARENT, BlockKey, block_keys, tenant_digest
from common.ids import NO_INCARNATION
from common.messages import PullBlocks, PullEnded
from common.page_hashes import continue_chain, namespace_seed
from engine.config import EngineConfig
from engine.plans import HeldPlan
from engine.ranks.group import SilentLinks
from engine.transfers.jobs import Jobs
from transfer.client import AgentLinks

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
        page_tokens: int,
        req_to_token: torch.Tensor,
        jobs: Jobs,
        links: AgentLinks | SilentLinks,
        namespace_digest: Callable[[], bytes],
    ) -> None:
        """``req_to_token``: SGLang's table, [requests, positions]. ``namespace_digest``: that
        of the present weights."""
        self._config = config
        self._page_tokens = page_tokens
        self._req_to_token = req_to_token
        self._jobs = jobs
        self._links = links
        self._namespace_digest = namespace_digest
        self._progress: OrderedDict[str, _Progress] = OrderedDict()
        self._open_pulls: set[int] = set()
        self.offered_blocks_total = 0
        self.stored_blocks_total = 0
        self.deferred_offers_total = 0

    def begin(self, req: Any, plan: HeldPlan | None) -> None:
        """The prompt's KV is in this engine; the blocks that the plan names are in the store,
        the others are offered from now on."""
        page, namespace_digest = self._page_tokens, self._namespace_digest()
        if plan is not None and plan.namespace_digest != namespace_digest:
            return  # the prefill engine has computed with other weights
        keys = plan.keys if plan is not None else []
        last_hash = namespace_seed(req.extra_key, req.cache_salt)
        stored = continue_chain(last_hash, req.origin_input_ids[: len(keys) * page], page)
        if block_keys(namespace_digest, stored) != keys:
            stored = []  # a plan of another prompt
        salt = req.cache_salt or req.extra_key
        progress = _Progress(
            *(namespace_digest, len(stored), stored[-1] if stored else last_hash),
            tenant_digest(salt) if salt else "",
        )
        self._progress[req.rid] = progress
        while len(self._progress) > REQUESTS_MAX:
            self._progress.popitem(last=False)
        self.advance(req, len(req.origin_input_ids))

    def advance(self, req: Any, tokens: int) -> None:
        """The KV of the request's first ``tokens`` tokens is complete: offer full blocks."""
        progress = self._progress.get(req.rid)
        page = self._page_tokens
        if progress is None:
            return
        if progress.namespace_digest != self._namespace_digest():
            self.end(req)
            return
        while tokens // page > progress.blocks_done:
            if len(self._open_pulls) >= PULLS_OPEN_MAX:
                self.deferred_offers_total += 1
                return
            self._offer(req, progress, min(tokens // page, progress.blocks_done + PULL_BLOCKS_MAX))

    def end(self, req: Any) -> None:
        """The request leaves this engine."""
        self._progress.pop(req.rid, None)

    def _offer(self, req: Any, progress: _Progress, end: int) -> None:
        start, page = progress.blocks_done, self._page_tokens
        tokens = islice(chain(req.origin_input_ids, req.output_ids), start * page, end * page)
        hashes = continue_chain(progress.last_hash, tokens, page)
        rows = self._req_to_token[req.kv.req_pool_idx, start * page : end * page : page]
        keys = block_keys(progress.namespace_digest, hashes)
        parent = progress.last_key
        progress.blocks_done, progress.last_hash = end, hashes[-1]
        self._pull(keys, (rows // page).tolist(), parent, progress.tenant)

    def _pull(self, keys: list[BlockKey], pages: list[int], parent: BlockKey, tenant: str) -> None:
        agent, timeout_s = self._config.agent, self._config.pull_timeout_s

        def ended(reason: str) -> None:
            self._open_pulls.discard(job)

        incarnation = self._links.incarnation(agent) or NO_INCARNATION
        job = self._jobs.open(agent, incarnation, pages, timeout_s, ended)
        self._open_pulls.add(job)
        if self._links.send(agent, PullBlocks(job, keys, pages, timeout_s, parent, tenant)):
            self.offered_blocks_total += len(keys)
        else:
            self._jobs.over(job, f"agent {agent} is not reachable")

    def pull_ended(self, message: PullEnded) -> None:
        """Count what the agent now holds (link thread)."""
        self.stored_blocks_total += sum(message.held)
