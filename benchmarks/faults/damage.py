"""Bytes that are not what was written: flipped, or torn off as by a crash in mid-write."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storage.remote.objects.open_store import FORMAT_NAME

FLIPS = 8
TORN_BYTES = 64 << 10
SECTOR_BYTES = 4096


def damage_file(paths: Sequence[Path], flips: bool, rng: random.Random) -> str:
    """One of the files, in place."""
    if not paths:
        return "there is no file yet"
    path = rng.choice(sorted(paths))
    descriptor = os.open(path, os.O_RDWR)
    try:
        size = os.fstat(descriptor).st_size
        if flips:
            for _ in range(FLIPS):
                at = rng.randrange(size)
                (byte,) = os.pread(descriptor, 1, at)
                os.pwrite(descriptor, bytes([byte ^ 1 << rng.randrange(8)]), at)
        else:
            at = rng.randrange(max(1, size - TORN_BYTES)) // SECTOR_BYTES * SECTOR_BYTES
            os.pwrite(descriptor, bytes(TORN_BYTES), at)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path.name


def damage_object(files: Any, folder: str, flips: bool, rng: random.Random) -> str:
    """One of the store's objects, a pack or a manifest: replaced by a damaged copy. Not the one
    that names the format, without which no agent starts (docs/limits.md)."""
    kinds: dict[str, list[str]] = {}
    for path in sorted(files.find(folder)) if files.exists(folder) else []:
        kinds.setdefault(path.removeprefix(folder).split("/")[1], []).append(path)
    kinds.pop(FORMAT_NAME, None)
    if not kinds:
        return "there is no object yet"
    path = rng.choice(kinds[rng.choice(sorted(kinds))])
    content = bytearray(files.cat_file(path))
    if not content:
        return f"{path} is empty"
    if flips:
        for _ in range(FLIPS):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    else:
        del content[rng.randrange(len(content)) :]
    files.pipe_file(path, bytes(content))
    return path
