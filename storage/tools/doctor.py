"""``doctor``: why will nothing, or not all, or nothing fast, be read from this store?"""

from __future__ import annotations

import random
import time
from collections import Counter

import msgspec

from common.block import NO_PARENT
from common.sizes import format_size
from storage.index.owners import Selector
from storage.tiers.contract import BlockCorrupt, BlockMissing
from storage.tools.finding import Finding, Findings, Verdict
from storage.tools.progress import in_threads
from storage.tools.view import StoredBlock, StoreSummary, StoreView

SAMPLE_BLOCKS = 500
SAMPLE_S_MAX = 5.0
FUTURE_S_MAX = 60.0


class Expectations(msgspec.Struct, frozen=True):
    """What the operator knows of the store; None and 0: nothing."""

    owners: Selector | None = None
    read_bytes_per_s: int = 0
    min_free_bytes: int = 1 << 30


def doctor(view: StoreView, expected: Expectations) -> list[Finding]:
    """Every check, on a live store too: a bounded sample of the blocks is read."""
    summary = view.summary()
    blocks = list(view.blocks())
    findings = [
        *view.findings(),
        *_room(summary, expected),
        *_contents(blocks, expected),
        *_clock(blocks),
        *_sample(view, blocks, expected),
    ]
    return findings


def _room(summary: StoreSummary, expected: Expectations) -> Findings:
    free_bytes = summary.free_disk_bytes
    if free_bytes is None:
        return
    found = f"{format_size(free_bytes)} free on the disk"
    if free_bytes < expected.min_free_bytes:
        yield Finding(
            "room",
            Verdict.DOUBTFUL,
            f"{found}, wanted {format_size(expected.min_free_bytes)}",
            "the tier will not grow, and gives slabs back below --ssd-min-free-bytes: free "
            "space, or lower --ssd-bytes",
        )
    else:
        yield Finding("room", Verdict.GOOD, found)


def _contents(blocks: list[StoredBlock], expected: Expectations) -> Findings:
    if not blocks:
        yield Finding(
            "blocks",
            Verdict.BAD,
            "none",
            "nothing was stored yet, all of it was dropped, or this is not the store's folder",
        )
        return
    nbytes = sum(block.payload_bytes for block in blocks)
    owners = Counter(block.label.owner for block in blocks)
    found = f"{len(blocks)} of {len(owners)} owners, {format_size(nbytes)}"
    yield Finding("blocks", Verdict.GOOD, found)
    if expected.owners is not None:
        matching = sum(n for o, n in owners.items() if expected.owners.value_of(o) is not None)
        is_there = matching > 0
        yield Finding(
            "namespace",
            Verdict.GOOD if is_there else Verdict.BAD,
            f"{matching} blocks of {expected.owners}",
            ""
            if is_there
            else "none will be a hit: model, weights, KV dtype, page size and layout must be those "
            "that wrote the blocks (see `stats`)",
        )
    keys = {block.key for block in blocks}
    orphans = sum(b.label.parent != NO_PARENT and b.label.parent not in keys for b in blocks)
    yield Finding(
        "prefixes",
        Verdict.GOOD if orphans < len(blocks) / 2 else Verdict.DOUBTFUL,
        f"{orphans} blocks whose parent is not in this store",
        "" if orphans < len(blocks) / 2 else "they count only where another store has the parent",
    )


def _clock(blocks: list[StoredBlock]) -> Findings:
    ahead_s = max((b.written_ms for b in blocks), default=0) / 1000 - time.time()
    is_right = ahead_s < FUTURE_S_MAX
    yield Finding(
        "clock",
        Verdict.GOOD if is_right else Verdict.DOUBTFUL,
        "no block is from the future" if is_right else f"a block is {ahead_s:.0f} s ahead",
        "" if is_right else "set this machine's clock, or the writer's: ages and TTLs are wrong",
    )


def _sample(view: StoreView, blocks: list[StoredBlock], expected: Expectations) -> Findings:
    chosen = random.Random(0).sample(blocks, min(SAMPLE_BLOCKS, len(blocks)))
    if not chosen:
        return
    start = time.monotonic()
    outcomes, nbytes = Counter[str](), 0
    example = ""

    def check(block: StoredBlock) -> Exception | None:
        if time.monotonic() > start + SAMPLE_S_MAX:
            return TimeoutError("not looked at")
        try:
            view.read(block)
        except (BlockCorrupt, BlockMissing, OSError) as error:
            return error
        return None

    for block, error in zip(chosen, in_threads(check, chosen), strict=True):
        outcomes[type(error).__name__ if error is not None else "whole"] += 1
        nbytes += block.payload_bytes if error is None else 0
        if isinstance(error, BlockCorrupt | OSError) and not isinstance(error, TimeoutError):
            example = f"{block.where}: {error}"
    seconds = time.monotonic() - start
    bad = outcomes["BlockCorrupt"] + sum(outcomes[n] for n in outcomes if "Error" in n)
    bad -= outcomes["TimeoutError"]
    read = sum(outcomes.values()) - outcomes["TimeoutError"]
    yield Finding(
        "checksums",
        Verdict.BAD if bad else Verdict.GOOD,
        f"{bad} of {read} blocks read are damaged" + (f"; such as {example}" if bad else ""),
        "they are misses, and go when they are read; look at the disk, run `verify`" if bad else "",
    )
    yield _speed(nbytes / seconds, expected)


def _speed(bytes_per_s: float, expected: Expectations) -> Finding:
    found = f"{format_size(int(bytes_per_s))}/s while the sample was read"
    is_right = bytes_per_s >= expected.read_bytes_per_s
    return Finding(
        "speed",
        Verdict.GOOD if is_right else Verdict.DOUBTFUL,
        found if is_right else f"{found}, expected {format_size(expected.read_bytes_per_s)}/s",
        "" if is_right else "`bench` compares it with what this disk or link can do",
    )
