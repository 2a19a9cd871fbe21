"""Prefill engine: the moments of a forward and of a send (:mod:`engine.prefill.layers`)."""

from __future__ import annotations

import logging
from functools import partial
from http import HTTPStatus
from typing import Any

import torch

from engine.prefill.layers import PrefillLayers
from engine.prefill.suffix_send import SendsDone
from engine.runtime import runtime_if_up

log = logging.getLogger(__name__)


def _layers() -> PrefillLayers | None:
    engine = runtime_if_up()
    return engine.prefill_layers if engine is not None else None


def before_run_batch(scheduler: Any, batch: Any, *_: Any, **__: Any) -> None:
    """BEFORE ``Scheduler.run_batch``."""
    layers = _layers()
    if layers is not None and batch.forward_mode.is_extend():
        layers.begin(batch)


def after_run_batch(result: Any, scheduler: Any, *_: Any, **__: Any) -> None:
    """AFTER ``Scheduler.run_batch``."""
    layers = _layers()
    if layers is not None:
        layers.end()


def before_latent_write(pool: Any, layer: Any, *_: Any, **__: Any) -> None:
    """BEFORE ``MLATokenToKVPool.set_mla_kv_buffer``, which some of MLA's routes on CUDA call
    ahead of the attention. (Untested there.)"""
    layers = _layers()
    if layers is not None and layers.current is not None:
        layers.current.before_attention(layer.layer_id)


def around_attention(original: Any, attention: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``RadixAttention.forward``."""
    layers = _layers()
    forward = layers.current if layers is not None else None
    if forward is None:
        return original(attention, *args, **kwargs)
    forward.before_attention(attention.layer_id)
    result = original(attention, *args, **kwargs)
    forward.after_attention(attention.layer_id)
    return result


def before_add_request(queue: Any, req: Any, *_: Any, **__: Any) -> None:
    """BEFORE ``PrefillBootstrapQueue.add``, which drops a request that is to be aborted."""
    _refuse_other_weights(req)
    layers = _layers()
    if layers is not None and layers.window is not None:
        req.skip_radix_cache_insert = True


def _refuse_other_weights(req: Any) -> None:
    """Abort a request whose plan was accepted before the last weight update: its decode engine
    would take this engine's KV for that of the older weights. The gateway plans it again."""
    engine = runtime_if_up()
    if engine is not None and engine.plans.is_outdated(req.rid):
        reason = "the weights were updated after this request was planned"
        req.set_finish_with_abort(reason, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError")


def after_finish_loads(failed: list[Any], tree: Any, reqs: list[Any]) -> list[Any]:
    """AFTER ``UnifiedRadixCache.finish_external_linker_loads``, at the end of a forward: drop
    the requests whose prefix did not come. Ranks agree."""
    layers = _layers()
    forward = layers.current if layers is not None else None
    if forward is None or forward.window is None:
        return failed
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    reasons = forward.window.failed()
    whole = torch.tensor([req.rid not in reasons for req in reqs], dtype=torch.int)
    tree._all_reduce_attn_groups(whole, torch.distributed.ReduceOp.MIN)
    lost = [req for req, is_whole in zip(reqs, whole.tolist(), strict=True) if not is_whole]
    for req in lost:
        log.warning("prefix lost rid=%s reason=%r", req.rid, reasons.get(req.rid, "other rank"))
        req.discard_output_reason = FINISH_ABORT(
            "External KV cache load failed", HTTPStatus.SERVICE_UNAVAILABLE
        )
    forward.window.abandon()
    return failed + lost


def around_add_transfer(
    original: Any,
    manager: Any,
    room: int,
    kv_indices: Any,
    index_slice: slice,
    is_last_chunk: bool,
    *args: Any,
    wait_event: Any = None,
    **kwargs: Any,
) -> Any:
    """AROUND ``MooncakeKVManager.add_transfer_request``: a chunk whose layers went out by
    themselves has no pages left to send; its message to the decode engine waits for them.
    With a layer window others have nothing to send any more, so they fail."""
    layers = _layers()
    suffix = layers.suffix if layers is not None else None
    sends = suffix.claim(room, index_slice.stop, is_last_chunk) if suffix is not None else None
    if suffix is not None and sends is not None:
        kv_indices = kv_indices[:0]
        wait_event = SendsDone(partial(suffix.settle, room, sends))
    elif layers is not None and layers.window is not None and len(kv_indices):
        layers.suffix.refuse(room, "its KV could not leave layer by layer (unlike --tp?)")
        return None
    return original(
        manager,
        room,
        kv_indices,
        index_slice,
        is_last_chunk,
        *args,
        wait_event=wait_event,
        **kwargs,
    )


def around_drained_abort(original: Any, manager: Any, room: int) -> None:
    """AROUND ``MooncakeKVManager._maybe_ack_drained_abort``: not while our writes are in
    flight; the last of them asks again."""
    layers = _layers()
    if layers is None or not layers.suffix.is_in_flight(room):
        original(manager, room)


def around_inflight(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """AROUND ``process_disagg_prefill_inflight_queue``, the last thing before SGLang forms the
    next batch."""
    layers = _layers()
    if layers is None:
        return original(scheduler, *args, **kwargs)
    return layers.leaving.wait(lambda: original(scheduler, *args, **kwargs))
