"""The KV pool of a layer window (:mod:`engine.prefill.layer_ring`): W buffers for L layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from sglang.srt.configs.model_config import is_deepseek_dsa

from engine.config import EngineConfig
from engine.sglang.border import Use

_MHA = "mem_cache.memory_pool.MHATokenToKVPool."
_MLA = "mem_cache.memory_pool.MLATokenToKVPool."
USES = (
    Use("configs.model_config.is_deepseek_dsa", "whether a token also takes index keys"),
    Use("mem_cache.kv_cache_configurator.KVCacheConfigurator.model_config", "the model"),
    Use("configs.model_config.ModelConfig.hf_config", "what says so"),
    Use(
        "model_executor.pool_configurator.DefaultPoolConfigurator._compute_dsa_indexer_cell_size",
        "their bytes, which no window shortens",
        keywords=("kvc", "num_layers"),
    ),
    Use(_MHA + "layer_num", "how many buffers are made: set to W meanwhile"),
    Use(_MLA + "layer_num", "the same"),
    Use(_MHA + "k_buffer", "the buffers, by layer: replaced by a list with repetitions"),
    Use(_MHA + "v_buffer", "the same"),
    Use(_MLA + "kv_buffer", "the same"),
)


def around_create_buffers(original: Callable[[Any], None], pool: Any) -> None:
    """AROUND ``MHATokenToKVPool._create_buffers_normal`` and
    ``MLATokenToKVPool._create_buffers``: W buffers instead of L, each known by the names of
    all its layers. SGLang registers equal regions once (mooncake/conn.py)."""
    window, layers = _window_of(pool.layer_num), pool.layer_num
    if not window:
        original(pool)
        return
    pool.layer_num = window
    try:
        original(pool)
    finally:
        pool.layer_num = layers
    for name in ("k_buffer", "v_buffer", "kv_buffer"):
        buffers = getattr(pool, name, None)
        if buffers:
            setattr(pool, name, [buffers[layer % window] for layer in range(layers)])


def after_kv_size(result: Any, pool: Any) -> Any:
    """AFTER ``get_kv_size_bytes``, which counts every name of a buffer."""
    window, layers = _window_of(pool.layer_num), pool.layer_num
    if not window:
        return result
    if isinstance(result, tuple):
        return tuple(size * window // layers for size in result)
    return result * window // layers


def after_cell_size(result: int, configurator: Any, kvc: Any, num_layers: int) -> int:
    """AFTER ``_compute_cell_size``: bytes that a token takes, from which SGLang sizes the
    pool for the device's memory. Index keys are kept of every layer."""
    window = _window_of(num_layers)
    if not window:
        return result
    whole = 0
    if is_deepseek_dsa(kvc.model_config.hf_config):
        whole = configurator._compute_dsa_indexer_cell_size(kvc=kvc, num_layers=num_layers)
    return whole - (whole - result) * window // num_layers


def around_fused_write(original: Callable[[Any], bool], forward_batch: Any) -> bool:
    """AROUND ``enable_fused_set_kv_buffer``: a kernel that writes KV along with the rotary
    embedding does so before the attention, hence before we know that the buffer is free.
    (Untested: such kernels are CUDA's.)"""
    return original(forward_batch) and not _layer_window()


def _window_of(num_layers: int) -> int:
    """W, or 0 where every layer has a buffer of its own."""
    window = _layer_window()
    return window if window < num_layers else 0


@cache
def _layer_window() -> int:
    return EngineConfig.from_env().layer_window or 0
