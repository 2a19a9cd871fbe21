"""Decode engine: the hit prefix is delivered straight into its pages while P works.

SGLang's decode engine matches its own radix tree, tells P how long the prefix is that it
already has (``decode_prefix_len``), and P sends only the rest. Here that length is raised by
the blocks of the plan: SGLang allocates pages for them, agents write them, and the request
joins the decode batch when P's part and every layer of ours have come. The moments at which
SGLang asks are those of :mod:`engine.sglang.decode.restore_hooks`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from enum import Enum

import msgspec

from common.messages.from_gateway import ReleasePlan
from common.samples import Sample, sample
from engine.config import EngineConfig
from engine.decode.persist import Persister
from engine.page_table import PageTable
from engine.plans import Fit, Plans
from engine.ranks.group import Links
from engine.sglang.views import Request
from engine.transfers.deliveries import Deliveries, Delivery

log = logging.getLogger(__name__)


class Restore(msgspec.Struct):
    """What one request is promised beyond what the engine's own cache has: blocks
    ``first_block`` up to, without it, ``end_block`` of its prompt."""

    fit: Fit
    first_block: int
    end_block: int
    delivery: Delivery | None = None
    """None until the pages exist."""


class RestoreState(Enum):
    UNDER_WAY = "under way"
    WHOLE = "whole"
    FAILED = "failed"


class Restores:
    """One for a decode engine; all of it runs in the scheduler's thread."""

    def __init__(
        self,
        config: EngineConfig,
        plans: Plans,
        deliveries: Deliveries,
        persister: Persister,
        links: Links,
        table: PageTable,
    ) -> None:
        self._planned_only = config.promise_planned_only
        self._plans = plans
        self._deliveries = deliveries
        self._persister = persister
        self._links = links
        self._table = table
        self.mismatches_total = 0
        """Requests whose KV was not what P sent."""

    def match_tokens_max(self, request: Request) -> int | None:
        """How much of the prompt the engine's own cache may be asked for; None: all. Where P
        brings the prefix layer by layer (:mod:`engine.prefill.layer_window`), it could not
        bring more than the plan has. One token more, since SGLang leaves one to P."""
        if not self._planned_only:
            return None
        fit = self._plans.fit(request)
        return (fit.blocks if fit is not None else 0) * self._plans.page_tokens + 1

    def promise(
        self, request: Request, cached_tokens: int, tokens_max: int | None = None
    ) -> Restore | None:
        """The plan's blocks beyond the ``cached_tokens`` of the engine's own cache, up to
        ``tokens_max``. At least one prompt token is left to P, whose forward yields the first
        output token; and windows are P's to send, whole, with the KV of their tokens."""
        page = self._plans.page_tokens
        fit = self._plans.fit(request)
        if fit is None or cached_tokens % page:
            return None
        first, end = cached_tokens // page, (len(request.origin_input_ids) - 1) // page
        if tokens_max is not None:
            end = min(end, tokens_max // page)
        restore = Restore(fit, first, min(fit.blocks, end))
        return restore if restore.end_block > first else None

    def start(self, request: Request, restore: Restore) -> None:
        """The pages exist: have the promised blocks written into them."""
        page = self._plans.page_tokens
        first, end = restore.first_block, restore.end_block
        pages = self._table.pages(request, first * page, end * page)
        # A request that has just ended gave its pages back while the forward in flight, which
        # still has it, writes one more token: agents must not be first.
        behind = self._table.streams.after_forwards()
        restore.delivery = self._deliveries.start(restore.fit.plan, first, pages, behind)

    def state(self, restore: Restore) -> RestoreState:
        """Whether the request may decode."""
        delivery = restore.delivery
        if delivery is not None and delivery.is_complete(self._deliveries.board):
            return RestoreState.WHOLE
        is_lost = delivery is not None and delivery.error
        return RestoreState.FAILED if is_lost else RestoreState.UNDER_WAY

    def commit(self, request: Request) -> None:
        """All of the prompt's KV is here, so the readers may let go."""
        if request.finished_reason is None:  # SGLang found the metadata sound
            self._persister.begin(request)
        self._release_plan(request.rid)

    def drop(self, request: Request, restore: Restore | None) -> None:
        """The request has failed or was aborted before it could decode."""
        if restore is not None and restore.delivery is not None:
            if reason := restore.delivery.error:
                log.warning("restore failed rid=%s reason=%r", request.rid, reason)
            self._deliveries.abandon(restore.delivery)
        self._release_plan(request.rid)

    def samples(self) -> Iterator[Sample]:
        """For the metrics."""
        yield sample("engine_kv_checksum_mismatches_total", self.mismatches_total)

    def _release_plan(self, rid: str) -> None:
        plan = self._plans.get(rid)
        if plan is None:
            return
        for agent in plan.agents:
            self._links.send(agent, ReleasePlan(plan.id))
        self._plans.drop(rid)
