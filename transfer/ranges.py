"""Ranges of bytes that are the same here and there: made, joined and cut, all at once."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
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
    layers: range,
    slots: Addresses,
    pages: Addresses,
) -> Ranges:
    """Some layers of n blocks, one after the other, in their slots and in the engine.

    ``addresses``: shape (layers, components), base of each buffer; ``slots``: shape
    (n,), address of each block's slot; ``pages``: shape (n,). At most n x components ranges of
    each layer: adjacent ones are merged, and of a component that it does not have there are none.
    """
    some = slice(layers.start, layers.stop)
    of_layout = _components(layout)
    sizes, starts = (each[some, None, :] for each in of_layout)
    local = slots[None, :, None] + starts
    remote = addresses[some, None, :] + pages[None, :, None] * sizes
    lengths = np.broadcast_to(sizes, local.shape)
    if layout.absent:
        is_there = lengths > 0
        return merge_adjacent(local[is_there], remote[is_there], lengths[is_there])
    return merge_adjacent(local.ravel(), remote.ravel(), lengths.ravel())


@lru_cache(64)
def _components(layout: BlockLayout) -> tuple[Addresses, Addresses]:
    """Of each layer and component the size, and where it begins in a block; both of shape
    (layers, components). Whoever moves blocks asks for each layer."""
    layers = range(layout.num_layers)
    sizes = np.array([layout.sizes(layer) for layer in layers], np.int64)
    starts = (np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape)
    return sizes, starts


def joined(each: Iterable[Ranges]) -> list[Ranges]:
    """All of them as one, so that they go in one batch; none where there are no bytes."""
    some = [ranges for ranges in each if len(ranges.lengths)]
    if len(some) < 2:
        return some
    return [Ranges(*(np.concatenate(arrays) for arrays in zip(*some, strict=True)))]


def merge_adjacent(local: Addresses, remote: Addresses, lengths: Addresses) -> Ranges:
    """Join neighbours in the given order that are contiguous on both sides."""
    follows = local[:-1] + lengths[:-1] == local[1:]
    if not follows.any():  # as a rule: what lies in one slot is in several of the engine's buffers
        return Ranges(local, remote, lengths)
    is_start = np.ones(len(lengths), bool)
    is_start[1:] = ~follows | (remote[:-1] + lengths[:-1] != remote[1:])
    first = np.flatnonzero(is_start)
    return Ranges(local[first], remote[first], np.add.reduceat(lengths, first))


def cut_ranges(local: Addresses, remote: Addresses, lengths: Addresses, bytes_max: int) -> Ranges:
    """The same bytes in the same order, in ranges of at most ``bytes_max``."""
    if lengths.min(initial=1) > 0 and lengths.max(initial=0) <= bytes_max:
        return Ranges(local, remote, lengths)
    parts = -(-lengths // bytes_max)
    whole = np.repeat(np.arange(len(lengths)), parts)
    first = np.repeat(np.cumsum(parts) - parts, parts)
    offsets = (np.arange(len(whole)) - first) * bytes_max
    return Ranges(
        local[whole] + offsets,
        remote[whole] + offsets,
        np.minimum(lengths[whole] - offsets, bytes_max),
    )
