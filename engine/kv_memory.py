"""The KV memory map: where a page's layer block lies in a running SGLang pool.

In every supported pool, page ``p`` of a buffer is the contiguous range
``[base + p * page_bytes, base + (p + 1) * page_bytes)``; page 0 is SGLang's padding page.
Source: sglang/srt/mem_cache/memory_pool.py (``get_contiguous_buf_infos``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from common.block import BlockLayout
from transfer.mooncake import Addresses
from transfer.ranges import merge_adjacent


class UnsupportedPool(Exception):
    """A KV pool whose blocks this version cannot move whole."""

    def __init__(self, pool: str, reason: str) -> None:
        super().__init__(
            f"DualPath cannot serve KV pool {pool}: {reason}. Start this model without "
            "launch.cluster, or remove the option that selects this pool."
        )


class KvMemory(msgspec.Struct, frozen=True):
    """``addresses[layer][component]``: base address of a buffer of this rank; components are
    (K, V) for MHA/GQA and (latent,) for MLA."""

    layout: BlockLayout
    """Of whole blocks; ``layout.shard`` is what this rank holds of one."""
    addresses: list[list[int]]
    kv_dtype: str

    @classmethod
    def of_pool(cls, pool: Any, kv_heads: int) -> KvMemory:
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
            raise UnsupportedPool(
                kind, f"{len(pointers)} buffers for {layers} layers (a draft model?)"
            )
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
        return cls(layout, addresses, str(pool.dtype).removeprefix("torch."))

    def address(self, layer: int, component: int, page: int) -> int:
        """First byte of one page's component in one layer."""
        return (
            self.addresses[layer][component] + page * self.layout.shard.component_bytes[component]
        )


def page_runs(
    local_pages: Addresses,
    remote_pages: Addresses,
    local_bases: Addresses,
    remote_bases: Addresses,
    page_bytes: Addresses,
) -> tuple[Addresses, Addresses, Addresses]:
    """Where pages lie in some buffers here, where there, and how long.

    Pages have shape (n,), the rest shape (buffers,). Returns three arrays of equal length
    (at most n x buffers): neighbours that are contiguous on both sides are merged.
    """
    local = local_bases[:, None] + local_pages * page_bytes[:, None]
    remote = remote_bases[:, None] + remote_pages * page_bytes[:, None]
    lengths = np.broadcast_to(page_bytes[:, None], local.shape)
    return merge_adjacent(local.ravel(), remote.ravel(), lengths.ravel())


def poison(buffers: Iterable[torch.Tensor], page_tokens: int, kept_pages: Sequence[int]) -> None:
    """Fill buffers of KV rows, (rows, ...) each, with noise, except those pages. For tests:
    a delivery that never happened is seen then."""
    pages = torch.tensor(kept_pages, dtype=torch.int64)
    kept = (pages[:, None] * page_tokens + torch.arange(page_tokens)).reshape(-1)
    for buffer in buffers:
        rows = buffer[kept].clone()
        buffer.normal_(0, 3)
        buffer[kept] = rows
