"""Decode engine: the hit prefix is delivered straight into its pages while P works.

SGLang's decode engine matches its own radix tree, tells P how long the prefix is that it
already has (``decode_prefix_len``), and P sends only the rest. These hooks raise that
length by the blocks of the plan: pages are allocated for them, agents write them, and the
request joins the decode batch when P's part and every layer of ours have come.

The hooked methods are those of sglang/srt/disaggregation/decode.py and
decode_hicache_mixin.py, whose own L3 restore this parallels.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from sglang.srt.disaggregation.base import KVPoll

from common.messages import ReleasePlan
from engine.plans import HeldPlan
from engine.runtime import runtime
from engine.transfers.deliveries import Delivery

log = logging.getLogger(__name__)


class Restore(msgspec.Struct):
    """One request's prefix restore, kept on its ``DecodePrefixMatch``."""

    plan: HeldPlan
    first_block: int
    blocks: int
    pages: list[int] = []
    delivery: Delivery | None = None


def _restore_of(decode_req: Any) -> Restore | None:
    return getattr(decode_req.prefix_match, "dualpath_restore", None)


def around_match(original: Any, queue: Any, req: Any) -> Any:
    """AROUND ``DecodePreallocQueue._match_prefix_and_lock``: match no further than the plan
    where P could not bring the rest (:mod:`engine.prefill.layer_window`)."""
    engine = runtime()
    if not engine.config.promise_planned_only:
        return original(queue, req)
    plan, prompt = engine.plans.get(req.rid), req.origin_input_ids
    planned = len(plan.keys) * queue.tree_cache.page_size if plan is not None else 0
    req.origin_input_ids = prompt[: planned + 1]  # at least one token is left to P
    try:
        return original(queue, req)
    finally:
        req.origin_input_ids = prompt


def after_prefix_match(match: Any, queue: Any, req: Any, result: Any, **_: Any) -> Any:
    """AFTER ``_build_decode_prefix_match``: promise the plan's blocks as well.

    At least one prompt token is left to P, whose forward yields the first output token.
    """
    engine = runtime()
    plan = engine.plans.get(req.rid)
    page = queue.tree_cache.page_size
    if plan is None or match.l1_prefix_len % page:
        return match
    on_device = match.l1_prefix_len // page
    hit = min(len(plan.keys), (len(req.origin_input_ids) - 1) // page)
    if hit <= on_device:
        return match
    if engine.prompt_keys(req, hit) != plan.keys[:hit]:
        log.warning("plan of another prompt ignored rid=%s plan=%d", req.rid, plan.id)
        return match
    match.dualpath_restore = Restore(plan, on_device, hit - on_device)
    match.l3_storage_hit_length = (hit - on_device) * page
    return match


def around_pre_alloc(
    original: Any,
    queue: Any,
    req: Any,
    prefix_indices: Any = None,
    prefix_len: int | None = None,
    total_prefix_len: int | None = None,
) -> Any:
    """AROUND ``_pre_alloc``: SGLang evicts enough for prefix and suffix but allocates only
    the suffix; the pages of the promised gap are allocated here."""
    kv_loc = original(queue, req, prefix_indices, prefix_len, total_prefix_len)
    gap = (total_prefix_len or 0) - (prefix_len or 0)
    if gap > 0:
        rows = queue.token_to_kv_pool_allocator.alloc(gap)
        if rows is None:
            raise RuntimeError(f"no pages for a restore of {gap} tokens: admission is wrong")
        queue.req_to_token_pool.write(
            (req.kv.req_pool_idx, slice(prefix_len, total_prefix_len)), rows
        )
    return kv_loc


def before_transfer_extend(queue: Any, decode_reqs: list[Any]) -> None:
    """BEFORE ``DecodeTransferQueue.extend``: the pages exist, start the deliveries."""
    for decode_req in decode_reqs:
        restore = _restore_of(decode_req)
        if restore is None:
            continue
        req, page = decode_req.req, queue.tree_cache.page_size
        # SGLang took the restored prefix for the tree's own; it is this request's until it
        # inserts it, and must be freed with it (decode.py sets cache_protected_len to the
        # promised length; a failed restore would leak the pages).
        req.kv.cache_protected_len = restore.first_block * page
        start = restore.first_block * page
        rows = queue.scheduler.req_to_token_pool.req_to_token[
            req.kv.req_pool_idx, start : start + restore.blocks * page : page
        ]
        restore.pages = (rows // page).tolist()
        restore.delivery = runtime().deliveries.start(
            restore.plan, restore.first_block, restore.pages
        )


def around_scatter(
    original: Any,
    handler: Any,
    staging_offset: int,
    page_start: int,
    num_pages: int,
    decode_req: Any,
    receiver: Any,
) -> Any:
    """AROUND ``DecodeStagingHandler._scatter_region`` (P and D of unlike tensor parallel sizes):
    SGLang counts the pages that P sent from ``cache_protected_len`` on, which is less than the
    promised prefix since :func:`before_transfer_extend`."""
    restore = _restore_of(decode_req)
    if restore is not None:
        promised = restore.first_block + restore.blocks
        page = handler.kv_buffer_info["page_size"]
        page_start += promised - decode_req.req.kv.cache_protected_len // page
    return original(handler, staging_offset, page_start, num_pages, decode_req, receiver)


class RestoreGate:
    """Stands for a KV receiver in SGLang's polls, and adds the restore's outcome."""

    def __init__(self, decode_req: Any) -> None:
        self._decode_req = decode_req

    def poll(self) -> Any:
        poll = self._decode_req.kv_receiver.poll()
        restore = _restore_of(self._decode_req)
        if restore is None or restore.delivery is None or poll == KVPoll.Failed:
            return poll
        engine = runtime()
        if restore.delivery.is_complete(engine.deliveries.board):
            return poll
        if restore.delivery.error:
            return KVPoll.Failed
        return KVPoll.Transferring if poll == KVPoll.Success else poll


def gated_pollers(original: Any, queue: Any) -> list[Any]:
    """AROUND ``DecodeTransferQueue._pollers``."""
    return [
        poller if _restore_of(decode_req) is None else RestoreGate(decode_req)
        for decode_req, poller in zip(queue.queue, original(queue), strict=True)
    ]


def around_commit(original: Any, queue: Any, decode_req: Any) -> Any:
    """AROUND ``_commit_transfer_to_req``: the prefix is whole, so the readers may let go.

    The restored pages belong to the request, not to the tree: SGLang's own restore is told
    that there is nothing to do, and the request inserts the pages like computed ones.
    """
    restore = _restore_of(decode_req)
    if restore is not None:
        decode_req.prefix_match.l3_storage_hit_length = 0
    result = original(queue, decode_req)
    engine, req = runtime(), decode_req.req
    if req.finished_reason is None:  # SGLang found the metadata sound
        engine.persister.begin(req, engine.plans.get(req.rid))
    _release(req.rid)
    return result


def before_release(queue: Any, decode_req: Any) -> None:
    """BEFORE ``DecodeTransferQueue._release_request``: a failed or aborted request."""
    restore = _restore_of(decode_req)
    if restore is not None and restore.delivery is not None:
        if restore.delivery.error:
            log.warning(
                "restore failed rid=%s reason=%r", decode_req.req.rid, restore.delivery.error
            )
        runtime().deliveries.abandon(restore.delivery)
    _release(decode_req.req.rid)


def _release(rid: str) -> None:
    engine = runtime()
    plan = engine.plans.get(rid)
    if plan is None:
        return
    for agent in plan.agents:
        engine.links.send(agent, ReleasePlan(plan.id))
    engine.plans.drop(rid)


def less_unevictable(result: int, queue: Any, *_: Any, **__: Any) -> int:
    """AFTER ``_allocatable_token_budgets``: evicting pages under transfer yields nothing."""
    return result - runtime().holds.unevictable_tokens
