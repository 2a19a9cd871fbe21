"""The in-memory twin of the tiers: same contract, same bookkeeping, no threads."""

from __future__ import annotations

from collections.abc import Sequence

from common.block import BlockKey, TierName
from storage.block_format import HEADER_BYTES, encode_header, verify
from storage.index.held_blocks import HeldBlocks
from storage.index.owners import Quota, Selector
from storage.tiers.block_tier import BlockTier
from storage.tiers.contract import BlockCorrupt, BlockMissing, EvictionCause, TierStats, Wake
from storage.tiers.operation import Kind, Operation
from storage.tiers.operation_queue import OperationQueue
from storage.tiers.room import Room

Blocks = dict[BlockKey, tuple[bytes, bytes]]
"""Each as (header, payload)."""


class MemoryTier(BlockTier):
    """Keeps blocks in ``blocks``. For tests and dry runs.

    ``blocks`` may be shared by several tiers, as object stores are shared by agents;
    pass ``index_is_complete=False`` for such a tier to try keys that it did not write.
    """

    def __init__(
        self,
        name: TierName,
        on_wake: Wake,
        capacity_bytes: int = 0,
        blocks: Blocks | None = None,
        index_is_complete: bool = True,
        quotas: Sequence[Quota] = (),
    ) -> None:
        self.blocks: Blocks = {} if blocks is None else blocks
        queue, placement = OperationQueue(on_wake), _BytesInUse(capacity_bytes, self.blocks)
        room = Room(HeldBlocks(name, placement.bytes_at, quotas), placement, queue.is_idle)
        super().__init__(name, queue, room, _Memory(queue, room, self.blocks), index_is_complete)


class _BytesInUse:
    """A block's place is what it takes of the capacity."""

    def __init__(self, capacity_bytes: int, blocks: Blocks) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._blocks = blocks

    def stored_bytes(self, nbytes: int) -> int:
        return HEADER_BYTES + nbytes

    def bytes_at(self, place: int) -> int:
        return place

    def reserve(self, nbytes: int, room: Room) -> int | None:
        stored_bytes, capacity_bytes = self.stored_bytes(nbytes), self.capacity_bytes
        if capacity_bytes:
            if stored_bytes > capacity_bytes:
                return None
            victims = room.victims()
            while self.used_bytes + stored_bytes > capacity_bytes:
                if (victim := next(victims, None)) is None:
                    return None
                room.evict(victim, EvictionCause.CAPACITY)
        self.used_bytes += stored_bytes
        return stored_bytes

    def release(self, place: int) -> None:
        self.used_bytes -= place

    def erase(self, key: BlockKey) -> None:
        self._blocks.pop(key, None)


class _Memory:
    """Carries operations out where they are started."""

    removed_on = (BlockCorrupt,)

    def __init__(self, queue: OperationQueue, room: Room, blocks: Blocks) -> None:
        self._queue = queue
        self._room = room
        self._blocks = blocks

    def start(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            operation.run(self._work)
            self._queue.hand_back(operation)

    def _work(self, operation: Operation) -> None:
        key = operation.key
        if operation.kind is Kind.REMOVE:
            self._blocks.pop(key, None)
        elif operation.kind is Kind.WRITE:
            payload = operation.private_payload()
            self._blocks[key] = encode_header(key, payload, operation.label), payload
        elif key in self._blocks:
            header, payload = self._blocks[key]
            operation.label = verify(header, payload, key).label
            operation.deliver(payload)
        else:
            raise BlockMissing("not stored")

    def accept(self, operation: Operation) -> bool:
        return True

    def tend(self) -> list[Operation]:
        return []

    def drop(self, selector: Selector) -> None:
        """Nothing outlasts the tier."""

    def take_drops(self) -> list[Selector]:
        return []

    def stats(self) -> TierStats:
        return TierStats(self._room.stats(), self._queue.stats.snapshot())

    def close(self) -> None:
        """Nothing is open."""
