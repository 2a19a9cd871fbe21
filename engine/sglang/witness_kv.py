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
from engine.sglang.prefill.made_up_forwards import MadeUpForwards
from engine.witness import Values, prompt, samples_of

log = logging.getLogger(__name__)

_MHA = "mem_cache.memory_pool.MHATokenToKVPool."
_MLA = "mem_cache.memory_pool.MLATokenToKVPool."
USES = (
    Use("managers.scheduler.Scheduler.token_to_kv_pool_allocator", "has the KV pool"),
    Use("mem_cache.allocator.base.BaseTokenToKVPoolAllocator.get_kvcache", "the KV pool"),
    Use(_MHA + "k_buffer", "its memory, by layer"),
    Use(_MHA + "v_buffer", "its memory, by layer"),
    Use(_MLA + "kv_buffer", "its memory, by layer"),
    Use(_MHA + "dtype", "what its bytes are, where they are kept as another type"),
    Use(_MLA + "dtype", "the same"),
)


@torch.no_grad()
def witness_values(scheduler: Any, engine: EngineRuntime) -> Values:
    """By a forward of SGLang's own, at every rank of the engine. With a layer window only the
    last layers are sampled: when it ends, the others' buffers have been used again."""
    forwards = MadeUpForwards(scheduler)
    tokens = prompt(forwards.vocabulary_tokens)
    layout, ranks = engine.memory.layout, engine.ranks
    shard = ranks.rank * layout.shards // ranks.size
    kept_layers = min(engine.config.layer_window or layout.num_layers, layout.num_layers)
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    buffers = [pool.kv_buffer] if hasattr(pool, "kv_buffer") else [pool.k_buffer, pool.v_buffer]

    def numbers(buffer: torch.Tensor, rows: torch.Tensor) -> Values:
        kept = buffer[rows].reshape(len(tokens), -1).contiguous().view(pool.dtype)
        return kept.float().cpu().numpy()

    def look(rows: torch.Tensor) -> Values:
        layers = [
            [numbers(of[layer], rows) for of in buffers] for layer in range(layout.num_layers)
        ]
        sampled = [[samples_of(own, shard, layout.shards) for own in layer] for layer in layers]
        values = np.array(sampled, np.float32)
        values[: layout.num_layers - kept_layers] = np.nan
        return values

    begun = time.monotonic()
    with engine.prefill_timing.clock.handing_to(_nobody):
        values = forwards.run_prompt(tokens, look)
    log.info("witness prompt computed seconds=%.3f", time.monotonic() - begun)
    return values


def _nobody(sample: ForwardSample) -> None:
    """A first forward takes longer than any later one: it counts for no estimate."""
