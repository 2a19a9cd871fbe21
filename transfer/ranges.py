"""Ranges of bytes that are the same here and there: made, joined and cut, all at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.block import BlockLayout

Addresses = NDArray[np.int64]


class Ranges(NamedTuple):
    """Arrays of shape (ranges,): where the bytes are here, where there, and how many."""

    local: Addresses
    remote: Addresses
    lengths: Addresses


def layer_ranges(
    layout: BlockLayout,
    kv_addresses: Addresses,
    layer: int,
    slots: Addresses,
    pages: Addresses,
) -> Ranges:
    """One layer of n blocks, in their slots and in the engine.

    ``kv_addresses``: shape (layers, components), base of each buffer; ``slots``: shape
    (n,), address of each block's slot; ``pages``: shape (n,). At most n x components ranges:
    adjacent ones are merged.
    """
    sizes = np.array(layout.component_bytes, np.int64)
    starts = np.cumsum(sizes) - sizes
    local = slots[:, None] + (layer * layout.layer_bytes + starts)
    remote = kv_addresses[layer] + pages[:, None] * sizes
    lengths = np.broadcast_to(sizes, local.shape)
    return merge_adjacent(local.ravel(), remote.ravel(), lengths.ravel())


def merge_adjacent(local: Addresses, remote: Addresses, lengths: Addresses) -> Ranges:
    """Join neighbours in the given order that are contiguous on both sides."""
    if len(lengths) < 2:
        return Ranges(local, remote, lengths)
    is_start = np.ones(len(lengths), bool)
    is_start[1:] = (local[:-1] + lengths[:-1] != local[1:]) | (
        remote[:-1] + lengths[:-1] != remote[1:]
    )
    first = np.flatnonzero(is_start)
    return Ranges(local[first], remote[first], np.add.reduceat(lengths, first))


def cut_ranges(local: Addresses, remote: Addresses, lengths: Addresses, bytes_max: int) -> Ranges:
    """The same bytes in the same order, in ranges of at most ``bytes_max``."""
    parts = -(-lengths // bytes_max)
    whole = np.repeat(np.arange(len(lengths)), parts)
    first = np.repeat(np.cumsum(parts) - parts, parts)
    offsets = (np.arange(len(whole)) - first) * bytes_max
    return Ranges(
        local[whole] + offsets,
        remote[whole] + offsets,
        np.minimum(lengths[whole] - offsets, bytes_max),
    )
