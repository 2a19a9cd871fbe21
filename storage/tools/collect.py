"""Garbage collection of an SSD folder that no process owns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

from storage.block_format import MAGIC, VERSION
from storage.ssd.folder import SsdFolder
from storage.ssd.slab import Slab

LiveSlots = dict[int, set[int]]
"""Slots with blocks that a start would find, by slab."""


def collect_folder(folder: Path, live: LiveSlots) -> dict[str, int]:
    """Erase every other slot that holds a header, delete slabs without a block and files that
    a crash left half made. Returns how many of each, and the bytes of the slabs.

    Raises DirectoryLocked, DirectoryUnusable or OSError.
    """
    counts: Counter[str] = Counter()
    lock = SsdFolder(folder)
    try:
        for path in folder.glob("*.new"):
            path.unlink(missing_ok=True)
            counts["temporary files"] += 1
        for path in sorted(folder.glob("*.slab")):
            slab = Slab.found(path, lock.direct_flag)
            if slab is None:
                continue
            if slots := live.get(slab.number):
                counts += _collect_slab(slab, slots)
                slab.file.close()
            else:
                counts["empty slabs"] += 1
                counts["bytes of slabs"] += slab.nbytes
                slab.file.delete()
    finally:
        lock.unlock()
    return dict(counts)


def _collect_slab(slab: Slab, live: Collection[int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for first, fields in slab.headers():
        for i, (magic, version) in enumerate(zip(fields["magic"], fields["version"], strict=True)):
            if magic != MAGIC or first + i in live:
                continue
            reason = "dropped, damaged or doubled blocks"
            counts[reason if version == VERSION else "blocks of other versions"] += 1
            slab.erase(first + i)
    return counts
