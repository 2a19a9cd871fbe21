"""SGLang's KV pools, as far as their blocks can be moved whole."""

from __future__ import annotations

from typing import Any

from common.block import BlockLayout
from engine.kv_memory import KvMemory
from engine.sglang.border import Use

_MHA = "mem_cache.memory_pool.MHATokenToKVPool"
_MLA = "mem_cache.memory_pool.MLATokenToKVPool"
USES = (
    Use(_MHA, "known by its name: K and V of each layer"),
    Use(_MLA, "known by its name: a latent of each layer"),
    Use(
        _MHA + ".get_contiguous_buf_infos",
        "address and bytes of a page of each buffer, all layers of K first",
    ),
    Use(_MLA + ".get_contiguous_buf_infos", "the same"),
    Use(_MHA + ".is_quantized_kv_cache", "its scales are kept elsewhere: refused"),
    Use(_MHA + ".head_num", "KV heads at this rank"),
    Use(_MHA + ".layer_num", "layers"),
    Use(_MLA + ".layer_num", "layers"),
    Use(_MHA + ".page_size", "tokens of a page"),
    Use(_MLA + ".page_size", "tokens of a page"),
    Use(_MHA + ".dtype", "type of its numbers"),
    Use(_MLA + ".dtype", "type of its numbers"),
)


class UnsupportedPool(Exception):
    """A KV pool whose blocks this version cannot move whole."""

    def __init__(self, pool: str, reason: str) -> None:
        super().__init__(
            f"DualPath cannot serve KV pool {pool}: {reason}. Start this model without "
            "launch.cluster, or remove the option that selects this pool."
        )


def memory_of(pool: Any, kv_heads: int) -> KvMemory:
    """Map a pool of a model with ``kv_heads`` at all ranks together; raises
    :class:`UnsupportedPool` for one that holds more than plain KV.

    Ranks split the heads of MHA/GQA; where there are fewer heads than ranks, some ranks
    hold the same one. MLA's latent has no heads: each rank holds all of it.

    The class is compared exactly: a subclass (quantised, page-interleaved, sliding
    window...) keeps parts elsewhere, and a block is all of a model's KV or nothing.
    """
    kind = type(pool).__name__
    components_per_layer = {"MHATokenToKVPool": 2, "MLATokenToKVPool": 1}.get(kind)
    if components_per_layer is None:
        raise UnsupportedPool(kind, "only MHATokenToKVPool and MLATokenToKVPool are known")
    if getattr(pool, "is_quantized_kv_cache", False):
        raise UnsupportedPool(kind, "its scales are kept outside the KV buffers")
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
    return KvMemory(layout, addresses, str(pool.dtype).removeprefix("torch."))
