"""SGLang's KV pools, as far as their blocks can be moved whole."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection
from typing import Any

import msgspec
import numpy as np
import torch

from common.block import BlockLayout, Part
from engine.kv_memory import KvMemory, PartMemory
from engine.page_table import Window
from engine.sglang.border import Use
from engine.sglang.pools import deepseek_v4
from engine.sglang.states.pool import state_parts, types_of
from engine.sglang.views import Allocator

_MHA = "mem_cache.memory_pool.MHATokenToKVPool"
_MLA = "mem_cache.memory_pool.MLATokenToKVPool"
_DSA = "mem_cache.memory_pool.DSATokenToKVPool"
_HYBRID = "mem_cache.memory_pool.HybridLinearKVPool"
_SWA = "mem_cache.swa_memory_pool.SWAKVPool"
_SWA_ALLOCATOR = "mem_cache.allocator.swa.SWATokenToKVPoolAllocator"
_INDEXER = "layers.attention.dsa.dsa_indexer.Indexer"
_LAYER = "layers.radix_attention.RadixAttention"
USES = (
    Use(_MHA, "known by its name: K and V of each layer"),
    Use(_MLA, "known by its name: a latent of each layer"),
    Use(_DSA, "known by its name: a latent of each layer, index keys of those with an indexer"),
    Use(_DSA + ".get_state_buf_infos", "address and bytes of a page of each layer's index keys"),
    Use(_DSA + ".index_kpool", "tokens that share an index key: refused above 1"),
    Use(_DSA + ".dsa_kv_cache_store_fp8", "whether rows of latents have scales in them"),
    Use(_DSA + ".kv_lora_rank", "numbers of a latent without those with a position"),
    Use(_DSA + ".quant_block_size", "numbers that share a scale"),
    Use("configs.model_config.is_deepseek_dsa", "whether the model has indexers"),
    Use("configs.model_config.dsa_layer_skips_topk", "whether a layer shares another's"),
    Use("configs.model_config.ModelConfig.hf_config", "what says so"),
    Use("configs.model_config.ModelConfig.num_hidden_layers", "layers"),
    Use("managers.scheduler.Scheduler.tp_worker", "has the model"),
    Use("managers.tp_worker.TpModelWorker.model_runner", "has the model"),
    Use("model_executor.model_runner.ModelRunner.model", "the model"),
    Use("models.deepseek_v2.DeepseekV3ForCausalLM.modules", "among which are its indexers"),
    Use(_INDEXER, "known by its name"),
    Use(_LAYER, "known by its name"),
    Use(_LAYER + ".k_scale_float", "what keys are divided by before they are float8"),
    Use(_LAYER + ".v_scale_float", "the same of values"),
    Use(_INDEXER + ".use_dsa_indexer_fusion", "its kernel does not rotate index keys"),
    Use(_INDEXER + ".use_aiter_fused_fp8_writer", "nor does this one"),
    Use(_INDEXER + ".scale_fmt", "how their scales are rounded"),
    Use("mem_cache.index_key_cache._use_aiter_preshuffle", "keys of a page are not in order"),
    Use(
        _MHA + ".get_contiguous_buf_infos",
        "address and bytes of a page of each buffer, all layers of K first",
    ),
    Use(_MLA + ".get_contiguous_buf_infos", "the same"),
    Use(_MHA + ".is_quantized_kv_cache", "its scales are kept elsewhere: refused"),
    Use(_MHA + ".kv_cache_layout", "refused where a page is not tokens one after the other"),
    Use(_MHA + ".head_num", "KV heads at this rank"),
    Use(_MHA + ".layer_num", "layers"),
    Use(_MLA + ".layer_num", "layers"),
    Use(_MHA + ".page_size", "tokens of a page"),
    Use(_MLA + ".page_size", "tokens of a page"),
    Use(_MHA + ".dtype", "type of its numbers"),
    Use(_HYBRID, "known by its name: KV of attention layers, beside states of recurrent ones"),
    Use(_HYBRID + ".full_kv_pool", "the former"),
    Use(_HYBRID + ".mamba_pool", "the latter"),
    Use("mem_cache.memory_pool.MambaPool.mamba_layer_ids", "which layers are recurrent"),
    Use(_HYBRID + ".full_attention_layer_id_mapping", "which layer is which of the former"),
    Use("managers.scheduler.Scheduler.req_to_token_pool", "has the states"),
    Use(_SWA, "known by its name: a pool of layers with all their KV, one of those with windows"),
    Use(_SWA + ".full_kv_pool", "the first"),
    Use(_SWA + ".swa_kv_pool", "the second"),
    Use(_SWA + ".layers_mapping", "which layer of the model is which of which pool"),
    Use(_SWA + ".swa_req_ring_size", "windows by request instead of by page: refused"),
    Use(_SWA + ".request_window", "the same"),
    Use(_SWA_ALLOCATOR, "known by its name: gives out pages of both pools"),
    Use(_SWA_ALLOCATOR + ".full_attn_allocator", "those of the first"),
    Use(_SWA_ALLOCATOR + ".swa_attn_allocator", "those of the second"),
    Use(_SWA_ALLOCATOR + ".full_to_swa_index_mapping", "rows of the second by rows of the first"),
    Use("managers.scheduler.Scheduler.sliding_window_size", "tokens whose windows P sends"),
    Use(_MLA + ".dtype", "type of its numbers"),
)


_UNKNOWN = (
    "only MHATokenToKVPool, MLATokenToKVPool, DSATokenToKVPool, SWAKVPool, HybridLinearKVPool and "
    "DeepSeekV4TokenToKVPool are known"
)
_SCALES = "the scales of its numbers are in buffers of their own, which are not moved"
_NOT_IN_A_BLOCK = {
    "MiniMaxSparseKVPool": "its index keys are in a pool of their own, which is not moved",
    "MHATokenToKVPoolMXFP8": _SCALES,
    "MHATokenToKVPoolFP4": _SCALES,
    "MLATokenToKVPoolFP4": _SCALES,
}
"""What pools have beside what is moved."""


class UnsupportedPool(Exception):
    """A KV pool whose blocks this version cannot move whole."""

    def __init__(self, pool: str, reason: str) -> None:
        super().__init__(
            f"DualPath cannot serve KV pool {pool}: {reason}. Start this model without "
            "launch.cluster, or remove the option that selects this pool."
        )


def shared_indexers(model_config: Any) -> tuple[int, ...]:
    """Layers of sparse attention that take another's choice, and so write no index keys. The
    pool cannot tell: a prefill engine's has room for all (SGLang leaves none out beside a
    linker), a decode engine's for the others alone."""
    from sglang.srt.configs.model_config import dsa_layer_skips_topk, is_deepseek_dsa

    config = model_config.hf_config
    if not is_deepseek_dsa(config):
        return ()
    layers = range(model_config.num_hidden_layers)
    return tuple(layer for layer in layers if dsa_layer_skips_topk(config, layer))


def kv_format(scheduler: Any) -> dict[str, str]:
    """What makes the bytes of KV, beside the model, its type and flags: part of the namespace.
    ``index_keys``: how they are written, where there are any; ``kv_scales``: by what KV is divided
    where it is float8, if by anything; ``states``: the types of recurrent layers' numbers."""
    format_of, scales = {}, []
    if hasattr(scheduler.req_to_token_pool, "mamba_pool"):
        format_of["states"] = types_of(scheduler.req_to_token_pool.mamba_pool)
    for module in scheduler.tp_worker.model_runner.model.modules():
        kind = type(module).__name__
        if kind == "Indexer":
            format_of["index_keys"] = _index_key_format(module)
        elif kind == "RadixAttention":
            scales += [module.k_scale_float, module.v_scale_float]
    given = [1.0 if scale is None else float(scale) for scale in scales]
    if any(scale != 1 for scale in given):
        packed = struct.pack(f"<{len(given)}f", *given)
        format_of["kv_scales"] = hashlib.sha256(packed).hexdigest()
    return format_of


def _index_key_format(indexer: Any) -> str:
    from sglang.srt.mem_cache import index_key_cache

    is_plain = indexer.use_dsa_indexer_fusion or indexer.use_aiter_fused_fp8_writer
    order = "shuffled" if index_key_cache._use_aiter_preshuffle else "in order"
    return f"{'plain' if is_plain else 'rotated'}, {indexer.scale_fmt}, {order}"


def numbers_of(pool: Any, rows: torch.Tensor) -> torch.Tensor:
    """Rows of one of a pool's buffers, shape (n, ...), as float32, shape (n, numbers).

    Sparse attention's may be float8 with scales: the latent, a float32 scale for each
    ``quant_block_size`` of its numbers, then the numbers with a position, in bfloat16.
    """
    rows = rows.reshape(len(rows), -1).contiguous()
    if not getattr(pool, "dsa_kv_cache_store_fp8", False):
        return rows.view(pool.dtype).float()
    rows, groups = rows.view(torch.uint8), pool.kv_lora_rank // pool.quant_block_size
    parts = [pool.kv_lora_rank, 4 * groups, rows.shape[1] - pool.kv_lora_rank - 4 * groups]
    latents, scales, positions = rows.split(parts, 1)
    grouped = latents.view(pool.dtype).float().view(len(rows), groups, -1)
    scaled = grouped * scales.contiguous().view(torch.float32)[..., None]
    return torch.cat([scaled.flatten(1), positions.contiguous().view(torch.bfloat16).float()], 1)


def bytes_of(pool: Any) -> int:
    """Of all its buffers."""
    if type(pool).__name__ == deepseek_v4.NAME:
        return deepseek_v4.bytes_of(pool)
    return int(np.sum(pool.get_kv_size_bytes()))


def allocators_of(allocator: Any) -> list[Allocator]:
    """Of the pool with the KV, then of each part's pool."""
    if type(allocator).__name__ != "SWATokenToKVPoolAllocator":
        return [allocator]
    return [allocator.full_attn_allocator, allocator.swa_attn_allocator]


def window_of(scheduler: Any) -> Window | None:
    """Of a model with sliding windows in a pool of their own."""
    allocator = scheduler.token_to_kv_pool_allocator
    if len(allocators_of(allocator)) == 1:
        return None
    return Window(allocator.full_to_swa_index_mapping, scheduler.sliding_window_size)


def send_whole_pages(scheduler: Any) -> None:
    """Where a window is less than a page, a prefill engine would keep to itself what is needed at
    the last full page's end, if the prompt goes on far enough behind it. So it sends a decode
    engine a page, for which that has room, and which it can store."""
    allocator = scheduler.token_to_kv_pool_allocator
    if len(allocators_of(allocator)) > 1:
        window_tokens = max(scheduler.sliding_window_size, allocator.page_size)
        scheduler.sliding_window_size = window_tokens


def memory_of(
    pool: Any,
    kv_heads: int,
    without_index: Collection[int] = (),
    window_tokens: int = 0,
    unstored: str = "",
) -> KvMemory:
    """Map a pool of a model with ``kv_heads`` at all ranks together, and with windows of so many
    tokens where it has any; raises :class:`UnsupportedPool` for one that holds more than these.
    ``unstored``: why recurrent layers' states are not stored, and so nothing is, if they are not.

    Ranks split the heads of MHA/GQA; where there are fewer heads than ranks, some ranks
    hold the same one. MLA's latent has no heads: each rank holds all of it, and of index keys
    (which layers ``without_index`` do not have).

    The class is compared exactly: a subclass (quantised, page-interleaved, sliding
    window...) keeps parts elsewhere, and a block is all of a model's KV or nothing.
    """
    kind = type(pool).__name__
    if kind == "DSATokenToKVPool":
        return _sparse_memory_of(pool, without_index)
    if kind == "HybridLinearKVPool":
        memory = memory_of(pool.full_kv_pool, kv_heads, without_index)
        if unstored:
            return msgspec.structs.replace(memory, unstored=unstored)
        return _with_states(memory, pool)
    if kind == "SWAKVPool":
        return _windowed_memory_of(pool, kv_heads, window_tokens)
    if kind == deepseek_v4.NAME:
        if reason := deepseek_v4.refusal(pool):
            raise UnsupportedPool(kind, reason)
        return deepseek_v4.memory_of(pool, window_tokens)
    components_per_layer = {"MHATokenToKVPool": 2, "MLATokenToKVPool": 1}.get(kind)
    if components_per_layer is None:
        raise UnsupportedPool(kind, _NOT_IN_A_BLOCK.get(kind, _UNKNOWN))
    if getattr(pool, "is_quantized_kv_cache", False):
        raise UnsupportedPool(kind, _SCALES)
    if (order := getattr(pool, "kv_cache_layout", "nhd")) != "nhd":
        raise UnsupportedPool(kind, f"a page is not tokens one after the other ({order})")
    pointers, _, page_bytes = pool.get_contiguous_buf_infos()
    layers = pool.layer_num
    if len(pointers) != layers * components_per_layer:
        raise UnsupportedPool(kind, f"{len(pointers)} buffers for {layers} layers (a draft model?)")
    addresses = [
        [int(pointers[c * layers + layer]) for c in range(components_per_layer)]
        for layer in range(layers)
    ]
    component_bytes = tuple(int(page_bytes[c * layers]) for c in range(components_per_layer))
    for layer in range(layers):
        for c in range(components_per_layer):
            if page_bytes[c * layers + layer] != component_bytes[c]:
                raise UnsupportedPool(kind, f"layer {layer} has pages of another size")
    shards = kv_heads // pool.head_num if kind == "MHATokenToKVPool" else 1
    whole = tuple(size * shards for size in component_bytes)
    layout = BlockLayout(pool.page_size, layers, whole, shards)
    return KvMemory(layout, addresses, _dtype_of(pool), kind == "MLATokenToKVPool")


def _sparse_memory_of(pool: Any, without_index: Collection[int]) -> KvMemory:
    kind, layers = "DSATokenToKVPool", range(pool.layer_num)
    if pool.index_kpool != 1:
        raise UnsupportedPool(kind, "several tokens share an index key")
    latents, _, latent_bytes = pool.get_contiguous_buf_infos()
    indexes, _, index_bytes = pool.get_state_buf_infos()
    with_index = [layer for layer in layers if layer not in without_index]
    sizes = {(int(latent_bytes[n]), int(index_bytes[n])) for n in with_index}
    if len(latents) != len(layers) or len(set(latent_bytes)) != 1 or len(sizes) != 1:
        raise UnsupportedPool(kind, f"{len(latents)} buffers, pages of {sizes} bytes")
    absent = ((), tuple(sorted(without_index))) if without_index else ()
    addresses = [[int(latents[n]), int(indexes[n]) if n in with_index else 0] for n in layers]
    layout = BlockLayout(pool.page_size, len(layers), sizes.pop(), absent=absent)
    return KvMemory(layout, addresses, _dtype_of(pool), has_latents=True)


def _windowed_memory_of(pool: Any, kv_heads: int, window_tokens: int) -> KvMemory:
    """Layers with all their KV are the blocks', those with windows a part's, whose places are
    pages of a pool of their own."""
    kind = "SWAKVPool"
    if pool.swa_req_ring_size is not None or pool.request_window is not None:
        raise UnsupportedPool(kind, "its windows are kept by request, not by page")
    pools = (pool.full_kv_pool, pool.swa_kv_pool)
    if {type(each).__name__ for each in pools} != {"MHATokenToKVPool"}:
        raise UnsupportedPool(kind, "only K and V are known in both of its pools")
    layers: dict[int, tuple[int, bool]] = pool.layers_mapping
    if sorted(layers) != list(range(len(layers))) or len({own for _, own in layers.values()}) < 2:
        raise UnsupportedPool(kind, "not all of its layers are here, or all are of one kind")
    (kv, kv_addresses), (windows, window_addresses) = (
        _over_all_layers(
            memory_of(each, kv_heads),
            {layer: at for layer, (at, in_windows) in layers.items() if in_windows == is_window},
            len(layers),
        )
        for each, is_window in zip(pools, (False, True), strict=True)
    )
    if kv.shards != windows.shards:
        raise UnsupportedPool(kind, "ranks split its windows otherwise than its other layers")
    whole = msgspec.structs.replace(windows, shards=1)
    part = Part("window", whole, -(-window_tokens // pool.page_size))
    memory = PartMemory(part, window_addresses)
    return KvMemory(kv, kv_addresses, _dtype_of(pool.full_kv_pool), parts=(memory,))


def _with_states(memory: KvMemory, pool: Any) -> KvMemory:
    """Of layers with KV, which are a pool's, and of recurrent ones, whose states are parts; a layer
    may be both, or none."""
    own = pool.full_attention_layer_id_mapping
    num_layers = max(*own, *pool.mamba_pool.mamba_layer_ids) + 1
    layout, addresses = _over_all_layers(memory, own, num_layers)
    parts = state_parts(pool.mamba_pool, num_layers, layout.page_tokens, layout.block_bytes)
    return msgspec.structs.replace(memory, layout=layout, addresses=addresses, parts=tuple(parts))


def _over_all_layers(
    memory: KvMemory, own: dict[int, int], num_layers: int
) -> tuple[BlockLayout, list[list[int]]]:
    """A pool's layout and addresses by layers of the model, of which it has some: ``own`` says
    where in it."""
    components = len(memory.layout.component_bytes)
    others = tuple(layer for layer in range(num_layers) if layer not in own)
    absent = (others,) * components if others else ()
    layout = msgspec.structs.replace(memory.layout, num_layers=num_layers, absent=absent)
    nothing = [0] * components
    addresses = [memory.addresses[own[n]] if n in own else list(nothing) for n in range(num_layers)]
    return layout, addresses


def _dtype_of(pool: Any) -> str:
    return str(pool.dtype).removeprefix("torch.")
