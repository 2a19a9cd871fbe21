"""DeepSeek-V4's pool, of pages of 256 tokens.

Compressed latents and index keys are by the pages of the tokens that they stand for: a block. The
latents of the last tokens, and what the next groups of 4 take from the last ones (a *state*), are
by pages of a pool for windows: the part ``window``. Groups of 128 end with a page, so of theirs no
state belongs to a block's end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from common.block import BlockLayout, Part
from engine.kv_memory import KvMemory, PartMemory
from engine.sglang.border import Use
from engine.sglang.pools.packed_rows import KEY, LATENT, read_latents, write_keys, write_latents

NAME = "DeepSeekV4TokenToKVPool"
_MODULE = "mem_cache.deepseek_v4_memory_pool."
_POOL = _MODULE + NAME + "."
_STATES = "mem_cache.deepseek_v4_compress_state.CompressStatePool."
USES = (
    Use(_MODULE + NAME, "known by its name"),
    Use(_MODULE + "DeepSeekV4SingleKVPool", "known by its name: pages of latents"),
    Use(_MODULE + "DeepSeekV4SingleKVPool.kv_buffer", "these, by layer"),
    Use(_MODULE + "DeepSeekV4IndexerPool.index_k_with_scale_buffer", "pages of keys, by layer"),
    Use(_MODULE + "DeepSeekV4IndexerPool.use_fp4_indexer", "keys of 4 bits: refused"),
    Use(_MODULE + "DeepSeekV4IndexerPool.page_size", "groups of a page"),
    Use(_POOL + "compression_ratios", "tokens of a group, by layer; 0: none"),
    Use(_POOL + "page_size", "tokens of a page"),
    Use(_POOL + "swa_page_size", "the same of windows"),
    Use(_POOL + "layer_num", "layers"),
    Use(_POOL + "dtype", "type of its numbers"),
    Use(_POOL + "kv_pools", "latents of groups, by their size"),
    Use(_POOL + "index_pools", "index keys, by the size of groups"),
    Use(_POOL + "layer_mapping", "which of these pools' layers a layer's is"),
    Use(_POOL + "swa_kv_pool", "latents of windows"),
    Use(_POOL + "compress_state_pools", "states, by layer"),
    Use(_POOL + "indexer_compress_state_pools", "the same of index keys"),
    Use(_POOL + "swa_req_ring_size", "windows by request instead of by page: refused"),
    Use(_POOL + "request_window", "the same"),
    Use(_POOL + "pd_kv_layout", "how rows are packed"),
    Use(_POOL + "get_contiguous_buf_infos", "bytes of all buffers by the KV's pages"),
    Use(_POOL + "get_state_buf_infos", "the same by the windows'"),
    Use(_POOL + "get_request_state_buf_infos", "the same by request"),
    Use(_POOL + "translate_loc_from_full_to_swa", "rows of the windows"),
    Use(_STATES + "kv_score_buffer", "their memory"),
    Use(_STATES + "ring_size", "tokens whose states a page has"),
    Use(_STATES + "online", "running sums instead of states: refused"),
    Use(_STATES + "request_scoped", "states by request, which no block has"),
)
_RATIOS = (4, 128)
_PACKED = "v4"


class Component:
    """What some of the layers keep of a page, each in a buffer of its own."""

    def __init__(self, buffers: dict[int, torch.Tensor], rows_of_page: int = 1) -> None:
        """By layer: of rows, of which a page has so many."""
        self._buffers = buffers
        self.page_bytes = rows_of_page * next(iter(buffers.values()))[0].nbytes

    def addresses(self, layers: int) -> list[int]:
        """0 in layers that have none."""
        return [self._buffers[n].data_ptr() if n in self._buffers else 0 for n in range(layers)]

    def absent(self, layers: int) -> tuple[int, ...]:
        return tuple(layer for layer in range(layers) if layer not in self._buffers)


def refusal(pool: Any) -> str:
    """Why pages of this one are not moved; empty: they are."""
    states = [each for each in pool.compress_state_pools if each is not None]
    pools = [pool.swa_kv_pool, *pool.kv_pools.values()]
    refused = {
        "its windows are kept by request, not by page": (
            pool.swa_req_ring_size is not None or pool.request_window is not None
        ),
        "its latents are packed otherwise than FlashMLA's of V4": (
            {type(each).__name__ for each in pools} != {"DeepSeekV4SingleKVPool"}
            or any(kind.rpartition(":")[2] != _PACKED for kind in pool.pd_kv_layout().split(","))
        ),
        "its groups are not of 4 and 128 tokens": not {*pool.compression_ratios} <= {0, *_RATIOS},
        "nobody has tried index keys of 4 bits": any(
            keys.use_fp4_indexer for keys in pool.index_pools.values()
        ),
        "it keeps running sums of groups of 128": any(each.online for each in states),
        "its windows have pages of another size": pool.swa_page_size != pool.page_size,
        "not all of its layers are here": len(pool.compression_ratios) != pool.layer_num,
    }
    return next((reason for reason, is_so in refused.items() if is_so), "")


def memory_of(pool: Any, window_tokens: int) -> KvMemory:
    """Of one that is not refused."""
    layers = pool.layer_num
    body = [
        Component(_of_groups(pool, 4, pool.kv_pools[4].kv_buffer)),
        Component(_of_groups(pool, 4, pool.index_pools[4].index_k_with_scale_buffer)),
        Component(_of_groups(pool, 128, pool.kv_pools[128].kv_buffer)),
    ]
    tail = [Component(dict(enumerate(pool.swa_kv_pool.kv_buffer)))]
    for states in (pool.compress_state_pools, pool.indexer_compress_state_pools):
        by_page = {n: of for n, of in enumerate(states) if of is not None and not of.request_scoped}
        rings = {of.ring_size for of in by_page.values()}
        buffers = {layer: of.kv_score_buffer.kv_score for layer, of in by_page.items()}
        tail.append(Component(buffers, *rings))
    part = Part("window", _layout(pool, tail), -(-window_tokens // pool.page_size))
    return KvMemory(
        _layout(pool, body),
        _addresses(body, layers),
        str(pool.dtype).removeprefix("torch."),
        parts=(PartMemory(part, _addresses(tail, layers)),),
    )


def _of_groups(pool: Any, ratio: int, buffers: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    return {
        layer: buffers[place.compress_layer_id]
        for layer, place in enumerate(pool.layer_mapping)
        if place.compress_ratio == ratio
    }


def _layout(pool: Any, components: Sequence[Component]) -> BlockLayout:
    return BlockLayout(
        pool.page_size,
        pool.layer_num,
        tuple(component.page_bytes for component in components),
        absent=tuple(component.absent(pool.layer_num) for component in components),
    )


def _addresses(components: Sequence[Component], layers: int) -> list[list[int]]:
    of_components = [component.addresses(layers) for component in components]
    return [list(of_layer) for of_layer in zip(*of_components, strict=True)]


def bytes_of(pool: Any) -> int:
    """Of all its buffers."""
    of_kinds = (pool.get_contiguous_buf_infos, pool.get_state_buf_infos)
    return sum(sum(of_kind()[1]) for of_kind in (*of_kinds, pool.get_request_state_buf_infos))


def numbers_of(pool: Any, layer: int, rows: torch.Tensor) -> torch.Tensor:
    """Of a layer's latents of windows, by rows of the KV pool: shape (n, numbers), float32."""
    rows = pool.translate_loc_from_full_to_swa(rows.long()).long()
    return read_latents(pool.swa_kv_pool.kv_buffer[layer], pool.swa_page_size, rows)


def poison(pool: Any, kept_pages: Sequence[int], kept_windows: Sequence[int]) -> None:
    """Fill all but those pages with noise, states of requests too. For tests."""
    groups = {ratio: pool.page_size // ratio for ratio in _RATIOS}
    for ratio, latents in pool.kv_pools.items():
        _fill(latents.kv_buffer, groups[ratio], write_latents, LATENT, kept_pages)
    for ratio, keys in pool.index_pools.items():
        _fill(keys.index_k_with_scale_buffer, groups[ratio], write_keys, KEY, kept_pages)
    _fill(pool.swa_kv_pool.kv_buffer, pool.swa_page_size, write_latents, LATENT, kept_windows)
    for states in _states(pool):
        values, ring = states.kv_score_buffer.kv_score, states.ring_size
        kept = [] if states.request_scoped else kept_windows
        rows = (torch.tensor(kept, dtype=torch.int64)[:, None] * ring + torch.arange(ring)).ravel()
        rows = torch.cat([rows, torch.tensor([len(values) - 1])])  # the last stands for no token
        before = values[rows].clone()
        values.normal_(0, 3)
        values[rows] = before


def _states(pool: Any) -> Iterator[Any]:
    for states in (*pool.compress_state_pools, *pool.indexer_compress_state_pools):
        if states is not None:
            yield states


def _fill(
    buffers: Iterable[torch.Tensor],
    page_rows: int,
    write: Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor], None],
    numbers: int,
    kept_pages: Sequence[int],
) -> None:
    kept = torch.tensor(kept_pages, dtype=torch.int64)
    for buffer in buffers:
        before, rows = buffer[kept].clone(), torch.arange(len(buffer) * page_rows)
        noise = torch.randn(len(rows), numbers, device=buffer.device) * 3
        write(buffer, page_rows, rows.to(buffer.device), noise)
        buffer[kept] = before
