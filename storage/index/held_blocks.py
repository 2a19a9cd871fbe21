"""The blocks that a tier holds: where each lies, whose it is, and which go first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.block import UNLABELLED, BlockKey, BlockLabel, BlockOwner, TierName
from common.messages.from_agents import Holding
from storage.index.eviction import IsIdle
from storage.index.index import BlockIndex
from storage.index.owners import OwnerGroups, Quota, Selector
from storage.tiers.contract import TierFull

RECLAIM_BLOCKS = 1024
"""Dropped blocks that go at once."""


class FoundBlocks(NamedTuple):
    """What an earlier process left: different keys, the oldest first. Block i takes
    ``stored_bytes[i]`` and belongs to ``owners[owner_of[i]]``; arrays of shape (blocks,)."""

    keys: Sequence[BlockKey]
    places: NDArray[np.int64]
    parents: Sequence[BlockKey]
    stored_bytes: NDArray[np.int64]
    owners: Sequence[BlockOwner]
    owner_of: NDArray[np.int64]


class HeldBlocks:
    """As a container it has the blocks that may be read. Those of dropped owners are not
    among them; they still lie in their places until :meth:`pop` takes them out.

    ``tier`` is whose they are, in what changes; ``bytes_at`` tells what a place takes.
    ``index`` has them all, dropped ones too, with the order in which they go.
    """

    def __init__(
        self, tier: TierName, bytes_at: Callable[[int], int], quotas: Sequence[Quota] = ()
    ) -> None:
        self.index = BlockIndex()
        self._tier = tier
        self._bytes_at = bytes_at
        self._dropped: set[int] = set()
        """Groups whose blocks are still to be taken out."""
        self.owners = OwnerGroups(quotas, self._dropped.discard)
        self._reclaimable: list[BlockKey] = []
        self._changes: list[Holding] = []

    def __len__(self) -> int:
        """Dropped ones included."""
        return len(self.index)

    def __contains__(self, key: object) -> bool:
        if not self._dropped:
            return key in self.index
        return key in self.index and not self.is_dropped(key)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[BlockKey]:
        return iter(filter(self.__contains__, self.index) if self._dropped else self.index)

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        test = self.__contains__ if self._dropped else self.index.__contains__
        return list(map(test, keys))

    def get(self, key: BlockKey) -> int | None:
        """The block's place; None if it may not be read here."""
        return self.index.get(key) if not self._dropped or key in self else None

    def is_dropped(self, key: BlockKey) -> bool:
        """Does a block lie here that has been dropped?"""
        return key in self.index and self.index.group(key) in self._dropped

    def add(self, key: BlockKey, place: int, label: BlockLabel = UNLABELLED) -> None:
        group = self.owners.group_of(label.part_owner)
        self.index.add(key, place, label.parent, group)
        self.owners.note(group, 1, self._bytes_at(place))
        self._changes.append(Holding(key, self._tier, True))

    def add_many(
        self, keys: Sequence[BlockKey], places: NDArray[np.int64], nbytes: int, label: BlockLabel
    ) -> None:
        """See :meth:`storage.index.index.BlockIndex.add_many`; all have one label, and take
        ``nbytes`` together."""
        group = self.owners.group_of(label.part_owner)
        self.index.add_many(keys, places, group)
        self.owners.note(group, len(keys), nbytes)
        self._changes += [Holding(key, self._tier, True) for key in keys]

    def pop(self, key: BlockKey) -> int | None:
        """Take a block out, dropped or not; returns its place, or None."""
        if key not in self.index:
            return None
        group = self.index.group(key)
        place = self.index.pop(key)
        assert place is not None
        self.owners.note(group, -1, -self._bytes_at(place))
        self._changes.append(Holding(key, self._tier, False))
        return place

    def take_changes(self) -> list[Holding]:
        """Gains and losses since the last call."""
        changes, self._changes = self._changes, []
        return changes

    def load(self, found: FoundBlocks) -> None:
        """Fill it at a start. No change is reported."""
        owners, owner_of = found.owners, found.owner_of
        groups = np.array([self.owners.group_of(owner) for owner in owners], np.int32)
        self.index.load(found.keys, found.places, found.parents, groups[owner_of])
        blocks = np.bincount(owner_of, minlength=len(owners)).tolist()
        nbytes = np.bincount(owner_of, found.stored_bytes, len(owners)).tolist()
        for group, count, total in zip(groups.tolist(), blocks, nbytes, strict=True):
            self.owners.note(group, count, int(total))

    def quota_victim(self, group: int, is_idle: IsIdle) -> BlockKey | None:
        """Who has to go, as a quota of owner ``group`` is exceeded; None: nobody has to.

        Raises TierFull if somebody has to and nobody is idle.
        """
        groups = self.owners.over_quota(group)
        if groups is None:
            return None
        victim = next(self.index.victims(is_idle, groups), None)
        if victim is None:
            raise TierFull("a quota leaves no room for the block")
        return victim

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
            self._reclaimable = self.index.of_groups(self._dropped)
            if not self._reclaimable:
                self._dropped.clear()
        part = self._reclaimable[-RECLAIM_BLOCKS:]
        del self._reclaimable[-RECLAIM_BLOCKS:]
        return [key for key in part if self.is_dropped(key)]
