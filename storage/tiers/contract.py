"""The contract of a storage tier below DRAM: submit, poll, partial success by key.

Nothing here blocks the caller. Work is submitted in batches; every block of a
batch completes on its own, with or without an error; completions are polled.
A tier wakes its owner through ``on_wake`` (called from any thread) whenever
``poll`` has something new. All other methods belong to one thread, the owner's.

A tier never returns wrong bytes: a block that is absent, truncated, of another
key, or whose checksum does not match completes with an error, is dropped from
the tier, and is reported as lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol

import msgspec

from common.block import UNLABELLED, BlockKey, BlockLabel, TierName
from common.messages.from_agents import Holding
from common.samples import Latencies
from storage.index.owners import Selector


class EvictionCause(str, Enum):
    """Why a whole block went."""

    CAPACITY = "capacity"
    QUOTA = "quota"
    SLOT_SIZE = "slot-size"
    """Its slab made way for blocks of another size."""
    DISK_SPACE = "disk-space"
    """Others have filled the disk."""
    DROPPED = "dropped"


class BlockMissing(Exception):
    """The tier does not hold the block (any more)."""


class BlockCorrupt(Exception):
    """The tier held bytes under this key that are not the block; it dropped them."""


class TierFull(Exception):
    """The block was not stored: no room could be made, or the device refused it."""


class TierBusy(Exception):
    """The tier's queue is full: the block was neither read nor stored."""


class BlockIO(msgspec.Struct, frozen=True):
    """One block to read into, or write from, ``buffer`` (exactly one block long).

    The buffer must stay valid until the block's completion has been polled.
    """

    key: BlockKey
    buffer: memoryview
    label: BlockLabel = UNLABELLED
    """Stored with the block; of no meaning to a read."""


class Completion(msgspec.Struct, frozen=True):
    """The end of one block's read or write. ``error`` is None on success."""

    key: BlockKey
    is_write: bool
    error: Exception | None = None
    seconds: float = 0.0
    label: BlockLabel = UNLABELLED
    """Of a block that was read."""


class RoomStats(msgspec.Struct):
    """What a tier holds, may hold, and has let go."""

    capacity_bytes: int = 0
    """0: not bounded."""
    used_bytes: int = 0
    blocks: int = 0
    evictions_total: dict[EvictionCause, int] = {}

    @property
    def evicted_blocks_total(self) -> int:
        return sum(self.evictions_total.values())


class IoStats(msgspec.Struct):
    """Reads and writes: under way, ended, and how."""

    read_queue_bytes: int = 0
    """Promised to be read and not read yet."""
    write_queue_bytes: int = 0
    read_bytes_total: int = 0
    write_bytes_total: int = 0
    read_errors_total: int = 0
    write_errors_total: int = 0
    corrupt_blocks_total: int = 0
    missing_blocks_total: int = 0
    other_version_blocks_total: int = 0
    """Missing because they have another format version."""
    hits_total: int = 0
    """Blocks that were read, whole."""
    reads_in_flight: int = 0
    """Blocks whose read was asked for and has not ended."""
    writes_in_flight: int = 0
    retries_total: int = 0
    """Calls that were made once more after an error."""
    read_latency: Latencies = msgspec.field(default_factory=Latencies)
    """From submission to the end, of blocks read whole."""
    write_latency: Latencies = msgspec.field(default_factory=Latencies)

    def snapshot(self) -> IoStats:
        """A copy that later counting does not change."""
        return msgspec.structs.replace(
            self, read_latency=self.read_latency.copy(), write_latency=self.write_latency.copy()
        )


class DeviceStats(msgspec.Struct):
    """The disks of a tier."""

    devices: int = 0
    """In use."""
    failed_devices: int = 0
    """Taken out, with all that they held."""


class PackStats(msgspec.Struct):
    """The objects of a remote tier."""

    packs: int = 0
    """That are known."""
    unreadable_packs_total: int = 0
    """Damaged beyond use, or of another format version."""
    hedged_reads_total: int = 0
    """Asked for a second time because the first answer was late."""


class TierStats(msgspec.Struct):
    """Counters and gauges, of what a tier has; every one becomes a metric."""

    room: RoomStats = msgspec.field(default_factory=RoomStats)
    io: IoStats = msgspec.field(default_factory=IoStats)
    devices: DeviceStats | None = None
    packs: PackStats | None = None


class Tier(Protocol):
    """A bounded, evicting, content-addressed home of immutable blocks."""

    name: TierName

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which blocks are believed to be here: no I/O, so a hint."""

    def touch(self, keys: Sequence[BlockKey], replaced: Sequence[BlockKey] = ()) -> None:
        """A plan uses these blocks, first to last, wherever it reads them: of those that
        are here the first is now the most recently used. A prefix is of use only from its
        beginning. For those ``replaced`` something newer stands: where there is need of room they
        go first, but for those that several plans have used."""

    def submit_reads(self, blocks: Sequence[BlockIO]) -> None:
        """Read each block into its buffer."""

    def submit_writes(self, blocks: Sequence[BlockIO]) -> None:
        """Store each block durably. One already held completes at once."""

    def poll(self) -> list[Completion]:
        """Completions since the last call, without waiting."""

    def take_changes(self) -> list[Holding]:
        """Blocks gained (durably) or lost since the last call (eviction, corruption, writes)."""

    def drop(self, selector: Selector) -> None:
        """From now on the blocks of these owners are not here; their room comes back bit by
        bit. Blocks of theirs that are written later stay."""

    def take_drops(self) -> list[Selector]:
        """What others have asked this tier to drop since the last call; it has done so."""

    def keys(self) -> list[BlockKey]:
        """Every block held, for an announcement from scratch."""

    def stats(self) -> TierStats:
        """Present counters; cheap enough for every heartbeat."""

    def close(self) -> None:
        """End I/O within seconds and release files and threads."""


Wake = Callable[[], None]
