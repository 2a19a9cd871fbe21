"""Ranges of bytes that are the same here and there: made, joined and cut, all at once."""

from __future__ import annotations

from collections.abc import Iterable
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
    addresses: Addresses,
    layer: int,
    slots: Addresses,
    pages: Addresses,
) -> Ranges:
    """One layer of n blocks, in their slots and in the engine.

    ``addresses``: shape (layers, components), base of each buffer; ``slots``: shape
    (n,), address of each block's slot; ``pages``: shape (n,). At most n x components ranges:
    adjacent ones are merged, and of a component that the layer does not have there are none.
    """
    sizes = np.array(layout.sizes(layer), np.int64)
    bases, starts = addresses[layer], np.cumsum(sizes) - sizes
    if layout.absent:
        is_there = sizes > 0
        sizes, bases, starts = sizes[is_there], bases[is_there], starts[is_there]
    local = slots[:, None] + (layout.layer_start(layer) + starts)
    remote = bases + pages[:, None] * sizes
    lengths = np.broadcast_to(sizes, local.shape)
    return merge_adjacent(local.ravel(), remote.ravel(), lengths.ravel())


def joined(each: Iterable[Ranges]) -> list[Ranges]:
    """All of them as one, so that they go in one batch; none where there are no bytes."""
    some = [ranges for ranges in each if len(ranges.lengths)]
    if len(some) < 2:
        return some
    return [Ranges(*(np.concatenate(arrays) for arrays in zip(*some, strict=True)))]


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
