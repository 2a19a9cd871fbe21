"""This rank's KV of the witness prompt (:mod:`engine.witness`)."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch

from engine.prefill.forward_clock import ForwardSample
from engine.runtime import EngineRuntime
from engine.sglang.border import Use
from engine.sglang.kv_pool import numbers_of
from engine.sglang.pools import deepseek_v4
from engine.sglang.prefill.made_up_forwards import MadeUpForwards
from engine.witness import Values, prompt, samples_of

log = logging.getLogger(__name__)

_MHA = "mem_cache.memory_pool.MHATokenToKVPool."
_MLA = "mem_cache.memory_pool.MLATokenToKVPool."
_HYBRID = "mem_cache.memory_pool.HybridLinearKVPool."
_SWA = "mem_cache.swa_memory_pool.SWAKVPool."
USES = (
    Use("managers.scheduler.Scheduler.token_to_kv_pool_allocator", "has the KV pool"),
    Use("mem_cache.allocator.base.BaseTokenToKVPoolAllocator.get_kvcache", "the KV pool"),
    Use(_MHA + "k_buffer", "its memory, by layer"),
    Use(_MHA + "v_buffer", "its memory, by layer"),
    Use(_MLA + "kv_buffer", "its memory, by layer"),
    Use(_HYBRID + "mamba_pool", "it is one of attention and recurrent layers"),
    Use(_HYBRID + "full_kv_pool", "of the former"),
    Use(_SWA + "layers_mapping", "which layer is which of which pool"),
    Use(_SWA + "full_kv_pool", "of layers with all their KV"),
    Use(_SWA + "swa_kv_pool", "of those with windows"),
    Use(_SWA + "translate_loc_from_full_to_swa", "the rows of the second pool"),
)


@torch.no_grad()
def witness_values(scheduler: Any, engine: EngineRuntime) -> Values:
    """By a forward of SGLang's own, at every rank of the engine, in which no draft runs. With a
    layer window only the last layers are sampled: when it ends, the others' buffers have been used
    again."""
    forwards = MadeUpForwards(scheduler)
    tokens = prompt(forwards.vocabulary_tokens)
    layout, ranks = engine.memory.layout, engine.ranks
    shard = ranks.rank * layout.shards // ranks.size
    layers = layout.model_layers
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    if hasattr(pool, "mamba_pool"):  # states are seen by what attention makes of them
        pool, layers = pool.full_kv_pool, len(engine.memory.kv_layers)
    kept_layers = min(engine.config.layer_window or layers, layers)

    def look(rows: torch.Tensor) -> Values:
        looked_at = [_of_layer(pool, layer, rows) for layer in range(layers)]
        sampled = [[samples_of(own, shard, layout.shards) for own in layer] for layer in looked_at]
        values = np.array(sampled, np.float32)
        values[: layers - kept_layers] = np.nan
        return values

    begun = time.monotonic()
    with engine.prefill_timing.clock.handing_to(_nobody):
        values = forwards.run_prompt(tokens, look)
    log.info("witness prompt computed seconds=%.3f", time.monotonic() - begun)
    return values


def _of_layer(pool: Any, layer: int, rows: torch.Tensor) -> list[Values]:
    """Of each of a layer's buffers, the numbers of what lies in these rows of the KV pool."""
    if type(pool).__name__ == deepseek_v4.NAME:
        return [deepseek_v4.numbers_of(pool, layer, rows).cpu().numpy()]
    if hasattr(pool, "layers_mapping"):  # windows have a pool of their own
        place, is_window = pool.layers_mapping[layer]
        if is_window:
            rows = pool.translate_loc_from_full_to_swa(rows.long())
        return _of_layer(pool.swa_kv_pool if is_window else pool.full_kv_pool, place, rows)
    of = [pool.kv_buffer] if hasattr(pool, "kv_buffer") else [pool.k_buffer, pool.v_buffer]
    return [numbers_of(pool, buffers[layer][rows]).cpu().numpy() for buffers in of]


def _nobody(sample: ForwardSample) -> None:
    """A first forward takes longer than any later one: it counts for no estimate."""
