"""Decode engine: the moments of a prefix restore (:mod:`engine.decode.restore`).

The hooked methods are those of sglang/srt/disaggregation/decode.py and
decode_hicache_mixin.py, whose own L3 restore this parallels. A request's :class:`Restore` is
kept on its ``DecodePrefixMatch``.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.base import KVPoll

from engine.decode.restore import Restore, Restores, RestoreState
from engine.runtime import runtime
from engine.sglang.border import Use
from engine.sglang.kv_pool import allocators_of
from engine.sglang.pools import deepseek_v4

_QUEUE = "disaggregation.decode."
_MATCH = "disaggregation.decode_hicache_mixin.DecodePrefixMatch."

USES = (
    Use("disaggregation.base.KVPoll.Failed", "a receiver's part has failed, or ours"),
    Use("disaggregation.base.KVPoll.Success", "all that P sends is here"),
    Use("disaggregation.base.KVPoll.Transferring", "P's part is here, the prefix not yet"),
    Use(_MATCH + "l1_prefix_len", "tokens that the engine's own cache has"),
    Use(
        _MATCH + "l3_storage_hit_length",
        "what is promised beyond them, as SGLang's own restore from storage does; at the commit "
        "0, so that SGLang restores nothing",
    ),
    Use(_QUEUE + "DecodePreallocQueue.token_to_kv_pool_allocator", "allocates the gap's pages"),
    Use("mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc", "pages, as rows"),
    Use(
        "mem_cache.allocator.swa.SWATokenToKVPoolAllocator.clear_full_to_swa_mapping",
        "the gap's tokens have no windows",
    ),
    Use(_QUEUE + "DecodePreallocQueue.req_to_token_pool", "the table of the requests' rows"),
    Use("mem_cache.memory_pool.ReqToTokenPool.write", "note the gap's rows there"),
    Use(_QUEUE + "DecodeTransferQueue.queue", "requests whose KV is on its way"),
    Use(_QUEUE + "DecodeTransferQueue.tree_cache", "for the page size"),
    Use("mem_cache.base_prefix_cache.BasePrefixCache.page_size", "tokens of a page"),
    Use(_QUEUE + "DecodeRequest.req", "the request"),
    Use(_QUEUE + "DecodeRequest.kv_receiver", "polled for P's part"),
    Use(_QUEUE + "DecodeRequest.prefix_match", "where its restore is kept"),
    Use("disaggregation.common.conn.CommonKVReceiver.poll", "how far P's part is"),
    Use("managers.schedule_batch.Req.origin_input_ids", "cut for a match, and put back"),
    Use("managers.schedule_batch.Req.kv", "the request's place in the table"),
    Use("managers.schedule_batch.ReqKvInfo.req_pool_idx", "its row there"),
    Use(
        "managers.schedule_batch.ReqKvInfo.cache_protected_len",
        "what is the tree's and not the request's: the restored prefix is the request's",
    ),
    Use(
        "disaggregation.common.staging_handler.DecodeStagingHandler.kv_buffer_info",
        "the page size there",
    ),
)


def _restores() -> Restores:
    return runtime().restores


def _restore_of(decode_req: Any) -> Restore | None:
    return getattr(decode_req.prefix_match, "dualpath_restore", None)


def around_validation(original: Any, *, token_to_kv_pool: Any, **given: Any) -> None:
    """AROUND ``validate_decode_radix_cache``: of DeepSeek-V4 a decode engine's cache gives what is
    by pages of tokens alone, up to where P's windows begin, with which their states come; those of
    requests P sends whole."""
    if type(token_to_kv_pool).__name__ != deepseek_v4.NAME or deepseek_v4.refusal(token_to_kv_pool):
        original(token_to_kv_pool=token_to_kv_pool, **given)


def around_match(original: Any, queue: Any, req: Any) -> Any:
    """AROUND ``DecodePreallocQueue._match_prefix_and_lock``."""
    tokens_max = _restores().match_tokens_max(req)
    if tokens_max is None:
        return original(queue, req)
    prompt = req.origin_input_ids
    req.origin_input_ids = prompt[:tokens_max]
    try:
        return original(queue, req)
    finally:
        req.origin_input_ids = prompt


def after_prefix_match(
    match: Any, queue: Any, req: Any, result: Any, *, max_prefix_len: int | None = None
) -> Any:
    """AFTER ``_build_decode_prefix_match``: promise the plan's blocks as well. With windows
    SGLang allocates their whole tail afresh: a prefix ends before it."""
    restore = _restores().promise(req, match.l1_prefix_len, max_prefix_len)
    if restore is not None:
        match.dualpath_restore = restore
        page = queue.tree_cache.page_size
        match.l3_storage_hit_length = (restore.end_block - restore.first_block) * page
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
        allocator = queue.token_to_kv_pool_allocator
        kv_pages, *of_windows = allocators_of(allocator)
        rows = kv_pages.alloc(gap)
        if rows is None:
            raise RuntimeError(f"no pages for a restore of {gap} tokens: admission is wrong")
        if of_windows:
            allocator.clear_full_to_swa_mapping(rows)
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
        req = decode_req.req
        # SGLang took the restored prefix for the tree's own; it is this request's until it
        # inserts it, and must be freed with it (decode.py sets cache_protected_len to the
        # promised length; a failed restore would leak the pages).
        page = queue.tree_cache.page_size
        req.kv.cache_protected_len = restore.first_block * page
        req.dualpath_promised_tokens = restore.end_block * page
        _restores().start(req, restore)


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
        page = handler.kv_buffer_info["page_size"]
        page_start += restore.end_block - decode_req.req.kv.cache_protected_len // page
    return original(handler, staging_offset, page_start, num_pages, decode_req, receiver)


class RestoreGate:
    """Stands for a KV receiver in SGLang's polls, and adds the restore's outcome."""

    def __init__(self, decode_req: Any, restore: Restore) -> None:
        self._decode_req = decode_req
        self._restore = restore

    def poll(self) -> Any:
        poll = self._decode_req.kv_receiver.poll()
        if self._restore.delivery is None or poll == KVPoll.Failed:
            return poll
        match _restores().state(self._restore):
            case RestoreState.FAILED:
                return KVPoll.Failed
            case RestoreState.UNDER_WAY if poll == KVPoll.Success:
                return KVPoll.Transferring
        return poll


def gated_pollers(original: Any, queue: Any) -> list[Any]:
    """AROUND ``DecodeTransferQueue._pollers``."""
    return [
        RestoreGate(decode_req, restore) if (restore := _restore_of(decode_req)) else poller
        for decode_req, poller in zip(queue.queue, original(queue), strict=True)
    ]


def around_commit(original: Any, queue: Any, decode_req: Any) -> Any:
    """AROUND ``_commit_transfer_to_req``: the prefix is whole.

    The restored pages belong to the request, not to the tree: SGLang's own restore is told
    that there is nothing to do, and the request inserts the pages like computed ones.
    """
    if _restore_of(decode_req) is not None:
        decode_req.prefix_match.l3_storage_hit_length = 0
    result = original(queue, decode_req)
    _restores().commit(decode_req.req)
    return result


def before_release(queue: Any, decode_req: Any) -> None:
    """BEFORE ``DecodeTransferQueue._release_request``: a failed or aborted request."""
    _restores().drop(decode_req.req, _restore_of(decode_req))


def less_unevictable(result: int, queue: Any, *_: Any, **__: Any) -> int:
    """AFTER ``_allocatable_token_budgets``: evicting pages under transfer yields nothing."""
    return result - runtime().holds.unevictable_tokens


def less_unevictable_windows(result: int, queue: Any, *_: Any, **__: Any) -> int:
    """AFTER ``_swa_tail_allocatable_token_budget``."""
    return result - sum(part.unevictable_tokens for part in runtime().holds.parts)
