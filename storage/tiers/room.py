"""The room that a tier's blocks take: who gets some, and who goes for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from common.block import BlockKey
from storage.index.held_blocks import HeldBlocks
from storage.tiers.contract import EvictionCause, RoomStats, TierFull
from storage.tiers.operation import Operation
from storage.tiers.placement import TOLD_LATER, Placement


class Room:
    """Held blocks in their places. A block that is not idle stays."""

    def __init__(
        self, held: HeldBlocks, placement: Placement, is_idle: Callable[[BlockKey], bool]
    ) -> None:
        self.held = held
        self.is_idle = is_idle
        self._placement = placement
        self._evictions: dict[EvictionCause, int] = {}

    def reserve(self, write: Operation) -> None:
        """A place for a block that is to be written; raises TierFull."""
        stored_bytes, owners = self._placement.stored_bytes(write.nbytes), self.held.owners
        group = write.group = owners.group_of(write.label.part_owner)
        owners.note(group, 0, stored_bytes)  # first: it keeps the group, whatever goes for it
        try:
            write.place = self._make_room(group, write.nbytes)
        except TierFull:
            owners.note(group, 0, -stored_bytes)
            raise

    def _make_room(self, group: int, nbytes: int) -> int:
        while (victim := self.held.quota_victim(group, self.is_idle)) is not None:
            self.evict(victim, EvictionCause.QUOTA)
        place = self._placement.reserve(nbytes, self)
        if place is None:
            raise TierFull(f"no room for {nbytes} bytes")
        return place

    def settle(self, write: Operation) -> None:
        """The block lies in its place, or the write has failed."""
        place, owners = write.place, self.held.owners
        assert place is not None
        if place != TOLD_LATER and write.error is not None:
            self._placement.release(place)
        elif place != TOLD_LATER:
            self.held.add(write.key, place, write.label)
            if write.group != owners.group_of(write.label.part_owner):  # while it was written
                self.evict(write.key, EvictionCause.DROPPED)
        owners.note(write.group, 0, -self._placement.stored_bytes(write.nbytes))

    def adopt(self, read: Operation) -> None:
        """A block that was read without being held lies here all the same."""
        place = self._placement.reserve(read.nbytes, self)
        if place is not None:
            self.held.add(read.key, place, read.label)

    def victims(self) -> Iterator[BlockKey]:
        """Idle blocks in the order in which they are to go, for the caller to evict."""
        return self.held.index.victims(self.is_idle)

    def evict(self, key: BlockKey, cause: EvictionCause) -> None:
        """An idle block goes though it is whole."""
        self._evictions[cause] = self._evictions.get(cause, 0) + 1
        self.lose(key)
        self._placement.erase(key)

    def lose(self, key: BlockKey) -> None:
        """A block is not here any more, if it was."""
        self.release(self.held.pop(key))

    def release(self, place: int | None) -> None:
        """Nothing lies in the place any more; None is ignored."""
        if place is not None:
            self._placement.release(place)

    def reclaim(self) -> bool:
        """Take some dropped blocks out, those in use later; True while there may be more."""
        idle = [key for key in self.held.some_dropped() if self.is_idle(key)]
        for key in idle:
            self.evict(key, EvictionCause.DROPPED)
        return bool(idle)

    def stats(self) -> RoomStats:
        """A copy."""
        placement = self._placement
        return RoomStats(
            capacity_bytes=placement.capacity_bytes,
            used_bytes=placement.used_bytes,
            blocks=len(self.held),
            evictions_total=dict(self._evictions),
        )
