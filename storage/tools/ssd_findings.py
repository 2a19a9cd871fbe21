"""What ``doctor`` looks at in an SSD folder, beside its blocks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from common.sizes import format_size
from storage.block_format import MAGIC, VERSION
from storage.ssd.folder import FolderState
from storage.ssd.notes import FolderNotes
from storage.ssd.slab import Slab
from storage.tiers.contract import DeviceStats, IoStats, RoomStats
from storage.tools.finding import Finding, Findings, Verdict

HEADERS_MAX = 20_000
"""Slots that are looked into for other versions and damaged headers."""


def ssd_findings(
    folder: Path,
    state: FolderState | None,
    slabs: Collection[Slab],
    notes: FolderNotes,
    process: str | None,
) -> Findings:
    """Permissions, owner, format, O_DIRECT, headers, what the tier counts, open requests."""
    yield _permissions(folder)
    yield Finding(
        "process", Verdict.GOOD, f"in use by process {process}" if process else "no owner"
    )
    yield _format(state)
    yield _direct_io(slabs)
    yield _headers(slabs)
    yield from _counters(notes)
    if process is None and (requests := notes.requests()):
        found = f"{len(requests)} drops are asked for, and no process owns the folder"
        yield Finding("drops", Verdict.GOOD, found + ": the next one does them")


def _permissions(folder: Path) -> Finding:
    modes = {"read": os.R_OK, "write": os.W_OK, "enter": os.X_OK}
    lacking = [name for name, mode in modes.items() if not os.access(folder, mode)]
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        found = "the file system is read-only"
        return Finding("permissions", Verdict.BAD, found, "remount it; look at the kernel's log")
    if lacking:
        found = f"this user may not {' or '.join(lacking)}"
        return Finding(
            "permissions", Verdict.BAD, found, "give the agent's user the folder (chown)"
        )
    return Finding("permissions", Verdict.GOOD, "this user may read and write")


def _format(state: FolderState | None) -> Finding:
    if state is not None:
        return Finding("format", Verdict.GOOD, f"folder format {state.format}")
    found = "the file 'state' is missing or damaged"
    advice = "the next start writes it anew, and nothing is lost; look at the disk"
    return Finding("format", Verdict.DOUBTFUL, found, advice)


def _direct_io(slabs: Collection[Slab]) -> Finding:
    if all(slab.file.is_direct for slab in slabs):
        return Finding("direct I/O", Verdict.GOOD, "the file system has O_DIRECT")
    advice = "reads and writes go through the page cache: use ext4 or XFS on the disk itself"
    return Finding("direct I/O", Verdict.DOUBTFUL, "the file system has no O_DIRECT", advice)


def _headers(slabs: Collection[Slab]) -> Finding:
    seen = other = 0
    for slab in slabs:
        for _, fields in slab.headers():
            is_block = fields["magic"] == MAGIC
            other += int((is_block & (fields["version"] != VERSION)).sum())
            seen += len(fields)
            if seen >= HEADERS_MAX:
                break
        if seen >= HEADERS_MAX:
            break
    if not other:
        found = f"block format {VERSION} in all of {seen} slots looked at"
        return Finding("versions", Verdict.GOOD, found)
    found = f"{other} of {seen} slots have blocks of another format version"
    advice = "this program cannot read them, and overwrites them; `gc` gives their room back"
    return Finding("versions", Verdict.DOUBTFUL, found, advice)


def _counters(notes: FolderNotes) -> Findings:
    counters = notes.counters()
    if counters is None:
        yield Finding("counters", Verdict.GOOD, "no tier has noted any yet")
        return
    room, io = counters.part(RoomStats), counters.part(IoStats)
    used = f"{format_size(room.used_bytes)} of {format_size(room.capacity_bytes)}"
    by_cause = Counter({cause.value: count for cause, count in room.evictions_total.items()})
    evicted = ", ".join(f"{count} for {cause}" for cause, count in by_cause.most_common())
    is_full = room.used_bytes > 0.98 * room.capacity_bytes
    yield Finding(
        "capacity",
        Verdict.DOUBTFUL if is_full and room.evictions_total else Verdict.GOOD,
        f"{used} used when process {counters.process} last said; evicted: {evicted or 'none'}",
        "full: what was used least goes for what is new; more --ssd-bytes would keep more"
        if is_full and room.evictions_total
        else "",
    )
    if io.hits_total == 0 and io.write_bytes_total:
        found = f"{io.write_bytes_total} bytes were written and no block was read"
        advice = "do prompts repeat, and with the same cache_salt? See `stats` for the owners"
        yield Finding("hits", Verdict.DOUBTFUL, found, advice)
    else:
        yield Finding("hits", Verdict.GOOD, f"{io.hits_total} blocks were read whole")
    failures = io.corrupt_blocks_total + io.write_errors_total
    failed_devices = counters.part(DeviceStats).failed_devices
    if failed_devices or failures:
        found = (
            f"{failed_devices} disks taken out, {io.corrupt_blocks_total} damaged blocks, "
            f"{io.write_errors_total} failed writes"
        )
        yield Finding("errors", Verdict.BAD, found, "look at the agent's log and at the disk")
