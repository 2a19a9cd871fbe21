"""The SSD tier's index at a million blocks: start, look-ups, memory."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store.load import Memory, SsdLoad
from common.block import KEY_BYTES, UNLABELLED, BlockKey
from storage.block_format import encode_owner
from storage.ssd.notes import FolderNotes
from storage.ssd.slab import slot_bytes_for
from storage.ssd.slab_table import ENTRY_BYTES, RECORD, encode_table, owner_number, table_bytes_for
from storage.ssd.tier import SsdTier

BLOCKS = 1_000_000
BLOCK_BYTES = 16 << 10
LOOKUP_KEYS, LOOKUPS = 2_000, 500
LOST_BLOCKS = 20_000


def measure_index(folder: Path) -> dict[str, Any]:
    """A folder of sparse slabs with true tables, as a killed agent leaves it, or a power cut:
    tables are durable, and read past the page cache."""
    keys = _make_folder(folder)
    before_bytes, start = _resident_bytes(), time.perf_counter()
    tier = SsdTier(folder, 2 * BLOCKS * slot_bytes_for(BLOCK_BYTES), lambda: None)
    restart_s = time.perf_counter() - start
    try:
        held = tier.stats().room.blocks
        if held != BLOCKS:
            raise RuntimeError(f"{held} of {BLOCKS} blocks were found")
        resident_bytes = _resident_bytes() - before_bytes
        lookups_s = sorted(_look_up(tier, keys) for _ in range(LOOKUPS))
    finally:
        tier.close()
    return {
        "restart_s": restart_s,
        "lookup_p50_ms": lookups_s[LOOKUPS // 2] * 1e3,
        "lookup_p99_ms": lookups_s[LOOKUPS * 99 // 100] * 1e3,
        "index_resident_bytes_per_block": resident_bytes / BLOCKS,
        "index_disk_bytes_per_block": ENTRY_BYTES,
    }


def _make_folder(folder: Path) -> bytes:
    """Returns the keys, end to end. Payloads are holes: only tables are read at a start."""
    slab_blocks, slot_bytes = BLOCKS // 16, slot_bytes_for(BLOCK_BYTES)
    records = np.zeros(BLOCKS, RECORD)
    keys = np.random.default_rng(3).bytes(BLOCKS * KEY_BYTES)
    records["key"] = np.frombuffer(keys, f"V{KEY_BYTES}")
    records["sequence"] = np.random.default_rng(4).permutation(BLOCKS) + 1
    records["payload_bytes"] = BLOCK_BYTES
    owner = UNLABELLED.owner
    records["owner"] = owner_number(encode_owner(owner))
    folder.mkdir()
    FolderNotes(folder).add_owners([owner])
    for number, first in enumerate(range(0, BLOCKS, slab_blocks)):
        part = records[first : first + slab_blocks]
        name = f"{number:06d}-{slot_bytes}x{len(part)}.slab"
        with (folder / name).open("wb") as slab:
            slab.write(encode_table(part))
            slab.truncate(table_bytes_for(len(part)) + len(part) * slot_bytes)
            os.fsync(slab.fileno())
            os.posix_fadvise(slab.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return keys


def _look_up(tier: SsdTier, keys: bytes) -> float:
    """Seconds for keys of which three in four are there."""
    wanted = [BlockKey(random.randbytes(KEY_BYTES)) for _ in range(LOOKUP_KEYS // 4)]
    for i in random.sample(range(BLOCKS), LOOKUP_KEYS - len(wanted)):
        wanted.append(BlockKey(keys[i * KEY_BYTES : (i + 1) * KEY_BYTES]))
    random.shuffle(wanted)
    start = time.perf_counter()
    found = tier.contains(wanted)
    seconds = time.perf_counter() - start
    if sum(found) != LOOKUP_KEYS * 3 // 4:
        raise RuntimeError(f"{sum(found)} keys were found")
    return seconds


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure_lost_tables(folder: Path) -> dict[str, Any]:
    """Blocks that a start finds per second where no table is right, so that it has to read
    their headers."""
    load = SsdLoad(folder, BLOCK_BYTES, LOST_BLOCKS, Memory(64 * BLOCK_BYTES))
    load.tier.close()
    for slab in folder.glob("*.slab"):
        num_slots = int(slab.stem.split("x")[1])
        with slab.open("r+b") as file:
            file.write(b"\xff" * table_bytes_for(num_slots))
    start = time.perf_counter()
    tier = SsdTier(folder, LOST_BLOCKS * slot_bytes_for(BLOCK_BYTES), lambda: None)
    seconds = time.perf_counter() - start
    found = tier.stats().room.blocks
    tier.close()
    if found != LOST_BLOCKS:
        raise RuntimeError(f"{found} of {LOST_BLOCKS} blocks were found")
    return {"restart_from_headers_blocks_per_s": LOST_BLOCKS / seconds}
