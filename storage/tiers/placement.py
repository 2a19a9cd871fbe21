"""What a kind of tier supplies: where its blocks lie, and what moves their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from common.block import BlockKey
from storage.index.owners import Selector
from storage.tiers.contract import TierStats
from storage.tiers.operation import Operation

if TYPE_CHECKING:
    from storage.tiers.room import Room

TOLD_LATER = -1
"""Place of a block that is on its way to one which nobody knows yet. The backend adds it to
the held blocks when it has one."""


class Placement(Protocol):
    """Where blocks lie, without any I/O. A place is a number; all that asks for one, or gives
    one back, is the owner's thread."""

    @property
    def capacity_bytes(self) -> int:
        """0: not bounded."""

    @property
    def used_bytes(self) -> int:
        """By all places that were given out."""

    def stored_bytes(self, nbytes: int) -> int:
        """What a block of so many bytes takes."""

    def bytes_at(self, place: int) -> int:
        """What the block in this place takes."""

    def reserve(self, nbytes: int, room: Room) -> int | None:
        """A place for a block, for which others are evicted; None: there is no room."""

    def release(self, place: int) -> None:
        """Nothing lies in the place any more."""

    def erase(self, key: BlockKey) -> None:
        """A block was evicted: take its bytes away, where they do not simply make way."""


class Backend(Protocol):
    """Moves bytes in threads of its own, hands operations back to the tier's queue, and has
    whatever a kind of tier does besides. Belongs to the owner's thread."""

    @property
    def removed_on(self) -> tuple[type[Exception], ...]:
        """Errors of reads after which what is stored is removed, by a REMOVE operation."""

    def start(self, operations: Sequence[Operation]) -> None:
        """Carry them out."""

    def accept(self, operation: Operation) -> bool:
        """An operation was handed back; False: it had to be started once more."""

    def tend(self) -> list[Operation]:
        """What is due, at each poll; returns started operations that it has ended itself."""

    def drop(self, selector: Selector) -> None:
        """Note for later starts, and for others, that the blocks of these owners are gone."""

    def take_drops(self) -> list[Selector]:
        """What others have asked for since the last call, and has been done."""

    def stats(self) -> TierStats:
        """Of the tier as a whole; a copy."""

    def close(self) -> None:
        """End I/O within seconds and release files and threads."""
