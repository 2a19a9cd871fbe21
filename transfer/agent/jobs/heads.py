"""Blocks for a rank that holds other heads than one of their shards: cut or joined.

A block computed by n tensor-parallel ranks has n shards. A rank of an engine of m ranks needs
n / m of them side by side in each token, or a part of one. Where m and n do not divide each
other there is no such block for it (:meth:`BlockLayout.can_serve`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from common.block import BlockLayout
from transfer.ranges import Addresses, Ranges

STAGING_BYTES = 4 << 20
"""Of each worker that needs one."""

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


@dataclass(frozen=True, eq=False)
class OtherShards:
    """``slots`` (indices, shape (n,)) of DRAM hold blocks of ``layout``; ``pages`` (shape (n,))
    are where one rank, which holds ``shard`` of ``shards``, wants its heads of them.

    ``dram``: all slots, shape (slots, slot bytes).
    """

    dram: Bytes
    slots: Addresses
    pages: Addresses
    layout: BlockLayout
    shards: int
    shard: int

    def gather(self, layer: int, component: int, rows: slice, out: Bytes) -> None:
        """Put one layer's pages of blocks ``rows`` one after the other into ``out``, shape
        (blocks, bytes of the rank's page)."""
        mine, slots = self.layout.shard, self.slots[rows]
        page_bytes = mine.component_bytes[component]
        start = mine.layer_start(layer) + sum(mine.sizes(layer)[:component])

        def shard_pages(shard: int) -> Bytes:
            first = shard * mine.block_bytes + start
            pages = self.dram[slots, first : first + page_bytes]
            return pages.reshape(len(slots), self.layout.page_tokens, -1)

        tokens = out.reshape(len(slots), self.layout.page_tokens, -1)
        if self.layout.shards >= self.shards:
            joined = self.layout.shards // self.shards
            width = tokens.shape[2] // joined
            for i in range(joined):
                tokens[:, :, i * width : (i + 1) * width] = shard_pages(self.shard * joined + i)
        else:
            parts = self.shards // self.layout.shards
            part, width = self.shard % parts, tokens.shape[2]
            source = shard_pages(self.shard // parts)
            tokens[...] = source[:, :, part * width : (part + 1) * width]


class Staging:
    """Registered memory of one worker, in which pages are put together before they are sent.

    ``register(address, length)`` makes it readable for transfers; ``page_bytes_max``: of one
    page in one buffer.
    """

    def __init__(self, register: Callable[[int, int], None], page_bytes_max: int) -> None:
        self._bytes = np.zeros(max(STAGING_BYTES, page_bytes_max), np.uint8)
        self._address = int(self._bytes.ctypes.data)
        register(self._address, self._bytes.nbytes)

    def ranges(self, blocks: OtherShards, kv_addresses: Addresses, layer: int) -> Iterator[Ranges]:
        """One layer of the blocks, some at a time, from here into the rank's memory. What one
        step gave is overwritten by the next."""
        for component, whole_bytes in enumerate(blocks.layout.sizes(layer)):
            if not whole_bytes:
                continue
            page_bytes = whole_bytes // blocks.shards
            at_once = len(self._bytes) // page_bytes
            for first in range(0, len(blocks.pages), at_once):
                rows = slice(first, first + at_once)
                pages = blocks.pages[rows]
                out = self._bytes[: len(pages) * page_bytes].reshape(len(pages), page_bytes)
                blocks.gather(layer, component, rows, out)
                local = self._address + np.arange(len(pages)) * page_bytes
                remote = kv_addresses[layer, component] + pages * page_bytes
                yield Ranges(local, remote, np.full(len(pages), page_bytes))
