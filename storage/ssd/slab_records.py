"""Records of slabs as arrays: which of them count, and whose they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.block import KEY_BYTES, BlockKey, BlockOwner, part_kind
from storage.index.owners import selected
from storage.ssd.notes import Drop

Records = NDArray[np.void]
"""Of dtype :data:`storage.ssd.slab_table.RECORD`."""


def keys_of(column: NDArray[np.void]) -> list[BlockKey]:
    """The keys of a column of them."""
    raw = column.tobytes()
    return [BlockKey(raw[i : i + KEY_BYTES]) for i in range(0, len(raw), KEY_BYTES)]


def latest(blocks: Records) -> NDArray[np.int64]:
    """Positions of the blocks, the oldest first; of those with one key that of the last."""
    order = np.argsort(blocks["sequence"])
    position_of = dict(zip(keys_of(blocks["key"][order]), range(len(order)), strict=True))
    if len(position_of) == len(order):
        return order
    return order[np.sort(np.fromiter(position_of.values(), np.int64))]


def owners_of(
    blocks: Records, owners: Mapping[int, BlockOwner]
) -> tuple[list[BlockOwner], NDArray[np.int64]]:
    """The owners of blocks, as quotas know them, and which of these each block has; ``owners`` by
    their numbers in tables."""
    numbers, owner_of = np.unique(blocks["owner"], return_inverse=True)
    found = [owners[number] for number in numbers.tolist()]
    of_parts = np.flatnonzero(blocks["part"] != b"")
    names, name_of = np.unique(blocks["part"][of_parts], return_inverse=True)
    pairs, pair_of = np.unique(owner_of[of_parts] * len(names) + name_of, return_inverse=True)
    owner_of[of_parts] = len(found) + pair_of
    for number, name in (divmod(pair, len(names)) for pair in pairs.tolist()):
        part = part_kind(names[name].decode(errors="replace"))
        found.append(msgspec.structs.replace(found[number], part=part))
    return found, owner_of


def apply_drops(
    tables: Iterable[Records], drops: Iterable[Drop], numbers: Mapping[BlockOwner, int]
) -> list[Drop]:
    """Take what was dropped for free slots; ``numbers`` are those of the owners in tables.
    Returns the drops that cover something that still lies in a slot."""
    tables, needed = list(tables), []
    for drop in drops:
        gone = selected(numbers, [drop.selector])
        dropped = np.array([numbers[owner] for owner in gone], np.uint64)
        covers = 0
        for records in tables:
            is_gone = np.isin(records["owner"], dropped)
            is_gone &= (records["sequence"] > 0) & (records["sequence"] < drop.sequence)
            covers += int(np.count_nonzero(is_gone))
            records["sequence"][is_gone] = 0
        if covers:
            needed.append(drop)
    return needed
