"""The moments of a forward (:mod:`engine.prefill.forwards`)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from engine.prefill.forwards import PrefillForward, PrefillForwards
from engine.runtime import runtime_if_up
from engine.sglang.border import Use

log = logging.getLogger(__name__)

USES = (
    Use("managers.schedule_batch.ScheduleBatch.forward_mode", "only forwards of prompts count"),
    Use("layers.radix_attention.RadixAttention.layer_id", "which layer it is"),
    Use("managers.schedule_batch.FINISH_ABORT", "how a request ends whose prefix did not come"),
    Use("managers.schedule_batch.Req.discard_output_reason", "end a request after its forward"),
    Use(
        "mem_cache.unified_radix_cache.UnifiedRadixCache._all_reduce_attn_groups",
        "ranks agree on those requests",
    ),
)


def forwards() -> PrefillForwards | None:
    """Of this engine; None before it is up."""
    engine = runtime_if_up()
    return engine.prefill_forwards if engine is not None else None


def _current() -> PrefillForward | None:
    followed = forwards()
    return followed.current if followed is not None else None


def before_run_batch(scheduler: Any, batch: Any, *_: Any, **__: Any) -> None:
    """BEFORE ``Scheduler.run_batch``."""
    followed = forwards()
    if followed is not None and batch.forward_mode.is_extend():
        followed.begin(batch)


def after_run_batch(result: Any, scheduler: Any, *_: Any, **__: Any) -> None:
    """AFTER ``Scheduler.run_batch``."""
    followed = forwards()
    if followed is not None:
        followed.end()


def before_latent_write(pool: Any, layer: Any, *_: Any, **__: Any) -> None:
    """BEFORE ``MLATokenToKVPool.set_mla_kv_buffer``, which some of MLA's routes on CUDA call
    ahead of the attention. (Untested there.)"""
    forward = _current()
    if forward is not None:
        forward.before_attention(layer.layer_id)


def before_index_read(cache: Any, layer_id: int, *_: Any, **__: Any) -> None:
    """BEFORE ``IndexKeyCache.get_local_buffer``: the indexer reads the keys of the prefix ahead
    of the attention."""
    forward = _current()
    if forward is not None:
        forward.before_attention(layer_id)


def around_layer_attention(original: Any, attention: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``RadixAttention.forward``, which some kinds of attention do not hand on to
    ``AttentionBackend.forward``."""
    return _followed(lambda: original(attention, *args, **kwargs), attention)


def around_backend_attention(
    original: Any, backend: Any, q: Any, k: Any, v: Any, layer: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND ``AttentionBackend.forward``: one layer's, the writing of its KV included. The
    replay of a breakable CUDA graph calls it at each break, and ``RadixAttention.forward``
    not at all."""
    return _followed(
        lambda: around_recurrence(original, backend, q, k, v, layer, *args, **kwargs), layer
    )


def around_hybrid_attention(
    original: Any,
    backend: Any,
    q: Any = None,
    k: Any = None,
    v: Any = None,
    layer: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """AROUND ``HybridLinearAttnBackend.forward``: the same of models with recurrent layers, which
    come here without a query."""
    around = around_recurrence if q is None else around_backend_attention
    return around(original, backend, q, k, v, layer, *args, **kwargs)


def around_recurrence(original: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``Mamba2AttnBackend.forward``, and where any layer's tokens meet: it is timed."""
    engine = runtime_if_up()
    if engine is None:
        return original(*args, **kwargs)
    return engine.prefill_timing.clock.attention(lambda: original(*args, **kwargs))


def _followed(run: Callable[[], Any], attention: Any) -> Any:
    """Both hooks may come, one within the other: the same layer counts once."""
    forward = _current()
    if forward is None:
        return run()
    forward.before_attention(attention.layer_id)
    result = run()
    forward.after_attention(attention.layer_id)
    return result


def after_finish_loads(failed: list[Any], tree: Any, reqs: list[Any]) -> list[Any]:
    """AFTER ``UnifiedRadixCache.finish_external_linker_loads``, at the end of a forward: drop
    the requests whose prefix did not come. Ranks agree."""
    forward = _current()
    if forward is None or forward.window is None:
        return failed
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
