"""``copy``: blocks of one store into another, each only if it is not there yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import msgspec

from common.block import BlockKey, BlockLabel
from storage.index.owners import Selector
from storage.tiers.contract import BlockCorrupt, BlockIO, BlockMissing, Tier
from storage.tools.look import chosen
from storage.tools.progress import in_threads, progress_bar
from storage.tools.view import StoredBlock, StoreUnusable, StoreView

IN_FLIGHT_MAX = 64
STALL_S_MAX = 120.0


class Copied(msgspec.Struct):
    """What has become of the blocks."""

    copied: int = 0
    copied_bytes: int = 0
    there_already: int = 0
    unreadable: int = 0
    refused: int = 0
    """By the target: full, or failed."""
    last_refusal: str = ""


class _Read(msgspec.Struct):
    block: StoredBlock
    label: BlockLabel | None
    """None: it could not be read."""
    payload: bytes = b""


def copy(view: StoreView, tier: Tier, selector: Selector | None) -> Copied:
    """A run that was cut short is continued by the next: what is there is not read again.

    Raises :class:`StoreUnusable` if the target stands still.
    """
    blocks = list(chosen(view, selector))
    there = tier.contains([block.key for block in blocks])
    wanted = [block for block, is_there in zip(blocks, there, strict=True) if not is_there]
    result = Copied(there_already=len(blocks) - len(wanted))
    with progress_bar("copy", sum(block.payload_bytes for block in wanted)) as advance:
        _write_all(tier, _reads(view, wanted), result, advance)
    return result


def _reads(view: StoreView, blocks: list[StoredBlock]) -> Iterator[_Read]:
    def read(block: StoredBlock) -> _Read:
        try:
            header, payload = view.read(block)
        except (BlockCorrupt, BlockMissing, OSError):
            return _Read(block, None)
        return _Read(block, header.label, bytes(payload))

    return in_threads(read, blocks)


def _write_all(
    tier: Tier, reads: Iterator[_Read], result: Copied, advance: Callable[[int], None]
) -> None:
    under_way: dict[BlockKey, int] = {}
    for read in reads:
        block = read.block
        if read.label is None:
            result.unreadable += 1
            advance(block.payload_bytes)
            continue
        tier.submit_writes([BlockIO(block.key, memoryview(read.payload), read.label)])
        under_way[block.key] = block.payload_bytes
        while len(under_way) >= IN_FLIGHT_MAX:
            advance(_take(tier, result, under_way))
    while under_way:
        advance(_take(tier, result, under_way))


def _take(tier: Tier, result: Copied, under_way: dict[BlockKey, int]) -> int:
    """Wait for some writes to end; returns the bytes of all that have."""
    end = time.monotonic() + STALL_S_MAX
    while not (completions := tier.poll()):
        if time.monotonic() > end:
            raise StoreUnusable(f"the target has stored nothing for {STALL_S_MAX:g} s")
        time.sleep(0.001)
    tier.take_changes()
    ended_bytes = 0
    for completion in completions:
        nbytes = under_way.pop(completion.key)
        ended_bytes += nbytes
        if completion.error is None:
            result.copied += 1
            result.copied_bytes += nbytes
        else:
            result.refused += 1
            result.last_refusal = str(completion.error)
    return ended_bytes
