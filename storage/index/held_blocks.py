"""The blocks that a tier holds: where each lies, whose it is, and which go first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from common.block import UNLABELLED, BlockKey, BlockLabel, BlockOwner
from storage.index.index import BlockIndex
from storage.index.owners import OwnerBook, Quota, Selector
from storage.tiers.contract import HoldingChange, TierFull

IsIdle = Callable[[BlockKey], bool]
RECLAIM_BLOCKS = 1024
"""Dropped blocks that go at once."""


class HeldBlocks:
    """As a container it has the blocks that may be read. Those of dropped owners are not
    among them; they still lie in their places until :meth:`pop` takes them out.

    ``bytes_at`` tells what a place takes.
    """

    def __init__(self, bytes_at: Callable[[int], int], quotas: Sequence[Quota] = ()) -> None:
        self._index = BlockIndex()
        self._bytes_at = bytes_at
        self.owners = OwnerBook(quotas)
        self._dropped: set[int] = set()
        """Groups whose blocks are still to be taken out."""
        self._reclaimable: list[BlockKey] = []
        self._changes: list[HoldingChange] = []

    def __len__(self) -> int:
        """Dropped ones included."""
        return len(self._index)

    def __contains__(self, key: object) -> bool:
        if not self._dropped:
            return key in self._index
        return key in self._index and not self.is_dropped(key)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[BlockKey]:
        return iter(filter(self.__contains__, self._index) if self._dropped else self._index)

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        test = self.__contains__ if self._dropped else self._index.__contains__
        return list(map(test, keys))

    def get(self, key: BlockKey) -> int | None:
        """The block's place; None if it may not be read here."""
        return self._index.get(key) if not self._dropped or key in self else None

    def place(self, key: BlockKey) -> int:
        """Where the block lies, dropped or not; KeyError if it does not."""
        place = self._index.get(key)
        if place is None:
            raise KeyError(f"block {key.hex()} is not here")
        return place

    def lies_here(self, key: BlockKey) -> bool:
        """Does a block have a place here, dropped or not?"""
        return key in self._index

    def is_dropped(self, key: BlockKey) -> bool:
        """Does a block lie here that has been dropped?"""
        return key in self._index and self._index.group(key) in self._dropped

    def add(self, key: BlockKey, place: int, label: BlockLabel = UNLABELLED) -> None:
        group = self.owners.group_of(label.owner)
        self._index.add(key, place, label.parent, group)
        self.owners.note(group, 1, self._bytes_at(place))
        self._changes.append(HoldingChange(key, True))

    def add_many(
        self, keys: Sequence[BlockKey], places: NDArray[np.int64], nbytes: int, label: BlockLabel
    ) -> None:
        """See :meth:`storage.index.index.BlockIndex.add_many`; all have one label, and take
        ``nbytes`` together."""
        group = self.owners.group_of(label.owner)
        self._index.add_many(keys, places, group)
        self.owners.note(group, len(keys), nbytes)
        self._changes += [HoldingChange(key, True) for key in keys]

    def pop(self, key: BlockKey) -> int | None:
        """Take a block out, dropped or not; returns its place, or None."""
        if key not in self._index:
            return None
        group = self._index.group(key)
        place = self._index.pop(key)
        assert place is not None
        self.owners.note(group, -1, -self._bytes_at(place))
        self._changes.append(HoldingChange(key, False))
        return place

    def take_changes(self) -> list[HoldingChange]:
        """Gains and losses since the last call."""
        changes, self._changes = self._changes, []
        return changes

    def load(
        self,
        keys: Sequence[BlockKey],
        places: NDArray[np.int64],
        parents: Sequence[BlockKey],
        stored_bytes: NDArray[np.int64],
        owners: Sequence[BlockOwner],
        owner_of: NDArray[np.int64],
    ) -> None:
        """Fill it at a start, with different keys, the oldest first. No change is reported.

        Block i takes ``stored_bytes[i]`` and belongs to ``owners[owner_of[i]]``.
        """
        groups = np.array([self.owners.group_of(owner) for owner in owners], np.int32)
        self._index.load(keys, places, parents, groups[owner_of])
        blocks = np.bincount(owner_of, minlength=len(owners)).tolist()
        nbytes = np.bincount(owner_of, stored_bytes, len(owners)).tolist()
        for group, count, total in zip(groups.tolist(), blocks, nbytes, strict=True):
            self.owners.note(group, count, int(total))

    # ---- order ------------------------------------------------------------------------

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """See :meth:`storage.index.index.BlockIndex.touch`."""
        self._index.touch(keys)

    def refresh(self, keys: Sequence[BlockKey]) -> None:
        """See :meth:`storage.index.index.BlockIndex.refresh`."""
        self._index.refresh(keys)

    def victims(self, is_idle: IsIdle) -> Iterator[BlockKey]:
        """See :meth:`storage.index.index.BlockIndex.victims`."""
        return self._index.victims(is_idle)

    def quota_victim(self, group: int, nbytes: int, is_idle: IsIdle) -> BlockKey | None:
        """Who has to go before owner ``group`` may have ``nbytes`` more; None: nobody has to.

        Raises TierFull if somebody has to and nobody is idle.
        """
        groups = self.owners.over_quota(group, nbytes)
        if groups is None:
            return None
        victim = next(self._index.victims(is_idle, groups), None)
        if victim is None:
            raise TierFull(f"a quota leaves no room for {nbytes} bytes")
        return victim

    def between(self, first: int, last: int) -> list[BlockKey]:
        """All that lie in places of [first, last)."""
        return self._index.between(first, last)

    # ---- bulk drop ----------------------------------------------------------------------

    def drop(self, selector: Selector) -> None:
        """The blocks of these owners are no longer here, in a time that does not grow with
        them; what is added of theirs from now on is."""
        self._dropped |= self.owners.drop(selector)
        self._reclaimable.clear()

    def some_dropped(self) -> list[BlockKey]:
        """A part of those that are still to be popped; all come in turn, until none is left."""
        if not self._dropped:
            return []
        if not self._reclaimable:
            self._reclaimable = self._index.of_groups(self._dropped)
            if not self._reclaimable:
                self._dropped.clear()
        part = self._reclaimable[-RECLAIM_BLOCKS:]
        del self._reclaimable[-RECLAIM_BLOCKS:]
        return [key for key in part if self.is_dropped(key)]
