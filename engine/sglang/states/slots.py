"""What :mod:`engine.sglang.states.hooks` calls: slots under transfers, and snapshots that leave."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.runtime_context import mamba_checkpoint_grid

from engine.runtime import runtime, runtime_if_up
from engine.sglang.border import Use
from engine.sglang.states.pool import SPARES, StateSlots
from engine.sglang.views import Request
from engine.transfers.page_holds import PageHolds

_KV = "managers.schedule_batch.ReqKvInfo."
USES = (
    Use("mem_cache.memory_pool.MambaPool.size", "set: SGLang is to know of its own slots"),
    Use("mem_cache.allocator.mamba.MambaSlotAllocator.free", "give slots back"),
    Use("mem_cache.allocator.mamba.MambaSlotAllocator.free_slots", "of which type they are"),
    Use("mem_cache.memory_pool.HybridReqToTokenPool.mamba_allocator", "whose slots are free"),
    Use("mem_cache.base_prefix_cache.BasePrefixCache.page_size", "tokens of a page"),
    Use("runtime_context.mamba_checkpoint_grid", "how far apart snapshots of a prompt can be"),
    Use("managers.schedule_batch.Req.mamba_branching_seqlen", "where a prompt leaves a known one"),
    Use(_KV + "mamba_ping_pong_track_buffer", "a request's snapshots: the last, the one before"),
    Use(_KV + "mamba_last_track_idx", "which of them is the last"),
    Use(_KV + "mamba_last_track_seqlen", "of how many tokens that is"),
    Use(_KV + "mamba_prev_track_seqlen", "of how many tokens the other is"),
)


class Snapshot(NamedTuple):
    """Of the first ``tokens`` tokens of a request, in a slot; shape (1,)."""

    tokens: int
    slot: torch.Tensor


def around_pool(original: Any, pool: Any, *, size: int, **settings: Any) -> None:
    """AROUND ``MambaPool.__init__``."""
    original(pool, size=size + SPARES, **settings)
    pool.size = size


# ---- slots under transfers ----------------------------------------------------------------


def _holds_of(allocator: Any) -> PageHolds | None:
    engine = runtime_if_up()
    for holds in engine.holds.parts if engine is not None else ():
        if isinstance(holds.allocator, StateSlots) and holds.allocator.allocator is allocator:
            return holds
    return None


def around_free(original: Any, allocator: Any, free_index: torch.Tensor) -> None:
    """AROUND ``MambaSlotAllocator.free``."""
    holds = _holds_of(allocator)
    original(allocator, free_index if holds is None else holds.keep_back(free_index))


def before_available_size(allocator: Any) -> None:
    """BEFORE ``MambaSlotAllocator.available_size``."""
    holds = _holds_of(allocator)
    slots = holds.take_returned() if holds is not None else []
    if slots:
        free = allocator.free_slots
        allocator.free(torch.tensor(slots, dtype=free.dtype, device=free.device))


def after_clear(result: Any, allocator: Any) -> None:
    """AFTER ``MambaSlotAllocator.clear``."""
    holds = _holds_of(allocator)
    if holds is not None:
        holds.after_clear()


def after_session_held(result: int, observer: Any) -> int:
    """AFTER ``session_held_mamba_slots``."""
    holds = _holds_of(observer.req_to_token_pool.mamba_allocator)
    return result if holds is None else result + holds.deferred_tokens


# ---- snapshots that leave -----------------------------------------------------------------


def last_snapshot(req: Any, tokens_max: int) -> Snapshot | None:
    """A request's latest of up to so many tokens. SGLang has two at a time, and takes one of a
    token more than a request ends with."""
    slots = req.kv.mamba_ping_pong_track_buffer
    if slots is None:
        return None
    last = req.kv.mamba_last_track_idx
    taken = [(req.kv.mamba_last_track_seqlen, last)]
    if len(slots) == 2 and last is not None:
        taken.append((req.kv.mamba_prev_track_seqlen, 1 - last))
    for tokens, index in taken:
        if tokens is not None and 0 < tokens <= tokens_max:
            return Snapshot(tokens, slots[index : index + 1])
    return None


def before_prompt_checkpoint(tree: Any, req: Any, *, up_to: int, **_: Any) -> None:
    """BEFORE ``UnifiedRadixCache.checkpoint`` of a prefill engine, which comes after each chunk of
    a prompt. A chunk's end has a snapshot, but that is no boundary to which anybody comes back."""
    snapshots = runtime().snapshots
    snapshot = last_snapshot(req, up_to) if snapshots is not None else None
    if snapshots is None or snapshot is None:
        return
    is_last = snapshot.tokens + mamba_checkpoint_grid(tree.page_size) > len(req.origin_input_ids)
    is_branch = snapshot.tokens == req.mamba_branching_seqlen
    if is_last or is_branch:
        snapshots.offer_prompt(req, snapshot.tokens, snapshot.slot, is_branch)


def offer_answer(req: Request, computed_tokens: int) -> None:
    """A decode engine's, of a request that ends."""
    engine = runtime()
    snapshot = last_snapshot(req, computed_tokens) if engine.snapshots is not None else None
    if engine.snapshots is None or snapshot is None:
        return
    key = engine.persister.key_at(req, snapshot.tokens)
    if key is not None:
        older = engine.persister.found_before(req, snapshot.tokens)
        engine.snapshots.offer(req, key, snapshot.slot, older)
