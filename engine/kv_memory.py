"""The KV memory map: where a page's layer block lies in the pool of a running engine.

In every supported pool (:mod:`engine.sglang.kv_pool`), page ``p`` of a buffer is the contiguous
range ``[base + p * page_bytes, base + (p + 1) * page_bytes)``; page 0 is SGLang's padding page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import torch

from common.block import BlockLayout
from engine.sglang.views import TransferEngine
from transfer.mooncake import Addresses, batches, transfer_batch
from transfer.ranges import merge_adjacent


class KvMemory(msgspec.Struct, frozen=True):
    """``addresses[layer][component]``: base address of a buffer of this rank; components are
    (K, V) for MHA/GQA and (latent,) for MLA."""

    layout: BlockLayout
    """Of whole blocks; ``layout.shard`` is what this rank holds of one."""
    addresses: list[list[int]]
    kv_dtype: str

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


class MemoryUnreachable(Exception):
    """The transport cannot read the KV pool of this process: every transfer would fail."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(
            f"Mooncake cannot reach this engine's KV memory ({what}, code {code}). On GPUs: load "
            "nvidia-peermem, or a driver with dma-buf (NVIDIA's open kernel modules), and raise "
            "the limit of locked memory (ulimit -l unlimited); or use --transfer tcp."
        )


def check_reachable(transfer_engine: TransferEngine, memory: KvMemory) -> None:
    """Read the first bytes of each buffer as others will; raises :class:`MemoryUnreachable`.

    SGLang goes on when the registration of its buffers has failed.
    """
    words = np.zeros(8, np.uint8)
    transfer_engine.register(int(words.ctypes.data), words.nbytes)
    remote = np.array(sorted({base for bases in memory.addresses for base in bases}))
    local = np.full_like(remote, words.ctypes.data)
    lengths = np.full_like(remote, words.nbytes)
    session, code = transfer_engine.get_session_id(), 0
    for part in batches(lengths):
        code = code or transfer_batch(
            transfer_engine.engine, "read", session, local[part], remote[part], lengths[part]
        )
    transfer_engine.deregister(int(words.ctypes.data))
    if code != 0:
        raise MemoryUnreachable("a read of its own", code)


def poison(buffers: Iterable[torch.Tensor], page_tokens: int, kept_pages: Sequence[int]) -> None:
    """Fill buffers of KV rows, (rows, ...) each, with noise, except those pages. For tests:
    a delivery that never happened is seen then."""
    pages = torch.tensor(kept_pages, dtype=torch.int64)
    kept = (pages[:, None] * page_tokens + torch.arange(page_tokens)).reshape(-1)
    for buffer in buffers:
        rows = buffer[kept].clone()
        buffer.normal_(0, 3)
        buffer[kept] = rows
