"""An SSD folder seen from outside. Nothing is locked or written, so a live tier goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from common.block import UNLABELLED, BlockLabel, BlockOwner
from common.json import JsonObject
from storage.block_format import (
    HEADER_BYTES,
    BlockHeader,
    decode_header,
    decode_owner,
    encode_owner,
    verify,
)
from storage.index.owners import Selector
from storage.ssd.direct_io import ThreadMemory
from storage.ssd.folder import (
    DirectoryLocked,
    DirectoryUnusable,
    owner_process,
    read_state,
)
from storage.ssd.notes import FolderNotes
from storage.ssd.slab import Slab
from storage.ssd.slab_records import Records, apply_drops, keys_of, latest
from storage.ssd.slab_table import owner_number
from storage.ssd.tier import SsdTier
from storage.tiers.contract import BlockCorrupt, BlockMissing
from storage.tools.collect import LiveSlots, collect_folder
from storage.tools.finding import Findings
from storage.tools.ssd_findings import ssd_findings
from storage.tools.view import StoredBlock, StoreSummary, StoreUnusable

DROP_TIMEOUT_S = 10.0
"""For a live tier to do what it was asked to: it looks once a second."""


class SsdView:
    """The folder of one device. Raises :class:`StoreUnusable`."""

    def __init__(self, folder: Path) -> None:
        self.url = str(folder)
        self.folder = folder
        self.notes = FolderNotes(folder)
        try:
            if not folder.is_dir():
                raise StoreUnusable(f"{folder} is no folder")
            self.state = read_state(folder)
            self.used_by = owner_process(folder)
            self.slabs = {slab.number: slab for slab in self._find_slabs()}
        except DirectoryUnusable as error:
            raise StoreUnusable(str(error)) from error
        except OSError as error:
            raise StoreUnusable(f"{folder}: {error.strerror}") from error
        if self.state is None and not self.slabs:
            raise StoreUnusable(f"{folder} holds no store (no file 'state', no slabs)")
        self._memory = ThreadMemory()

    def _find_slabs(self) -> Iterator[Slab]:
        for path in sorted(self.folder.glob("*.slab")):
            # direct: what is looked at must not push others' pages out of the page cache
            slab = Slab.found(path, _direct_flag(path), is_read_only=True)
            if slab is not None:
                yield slab

    @property
    def slab_bytes(self) -> int:
        return sum(slab.nbytes for slab in self.slabs.values())

    def summary(self) -> StoreSummary:
        status = os.statvfs(self.folder)
        return StoreSummary(
            url=self.url,
            kind="ssd",
            used_by=self.used_by,
            capacity_bytes=self.slab_bytes,
            free_disk_bytes=status.f_bavail * status.f_frsize,
            notes={
                "format": str(self.state.format) if self.state else "state file missing",
                "slabs": str(len(self.slabs)),
            },
        )

    # ---- blocks -----------------------------------------------------------------------

    def records(self) -> tuple[dict[int, Records], dict[int, BlockOwner]]:
        """Records by slab, without dropped blocks, and the owners by their numbers."""
        owners = {owner_number(encode_owner(owner)): owner for owner in self.notes.owners()}
        tables: dict[int, Records] = {}
        for number, slab in self.slabs.items():
            tables[number], raw = slab.records(owners)
            owners |= {owner_number(each): decode_owner(each) for each in raw}
        numbers = {owner: number for number, owner in owners.items()}
        apply_drops(tables.values(), self.notes.drops(), numbers)
        return tables, owners

    def blocks(self) -> Iterator[StoredBlock]:
        tables, owners = self.records()
        labels = {number: _label(owner) for number, owner in owners.items()}
        if not tables:
            return
        slab_of = np.repeat(list(tables), [len(records) for records in tables.values()])
        slot_of = np.concatenate([np.arange(len(records)) for records in tables.values()])
        every = np.concatenate(list(tables.values()))
        used = np.flatnonzero(every["sequence"] > 0)
        order = np.sort(used[latest(every[used])])
        found = every[order]
        rows = zip(
            keys_of(found["key"]),
            keys_of(found["parent"]),
            found["part"].tolist(),
            found["owner"].tolist(),
            found["payload_bytes"].tolist(),
            found["written_ms"].tolist(),
            slab_of[order].tolist(),
            slot_of[order].tolist(),
            strict=True,
        )
        for key, parent, part, owner, nbytes, written_ms, number, slot in rows:
            name = part.decode(errors="replace")
            label = msgspec.structs.replace(labels[owner], parent=parent, part=name)
            where = f"slab {number} slot {slot}"
            yield StoredBlock(key, label, nbytes, written_ms, where, (number, slot))

    def read(self, block: StoredBlock) -> tuple[BlockHeader, memoryview]:
        number, slot = block.place
        slab = self.slabs[number]
        whole = slab.read_whole(slot, self._memory.of(slab.slot_bytes))
        end = HEADER_BYTES + block.payload_bytes
        if whole.nbytes < end:
            raise BlockCorrupt(f"{block.where} ends after {whole.nbytes} of {end} bytes")
        header, payload = whole[:HEADER_BYTES], whole[HEADER_BYTES:end]
        try:
            return verify(header, payload, block.key), payload
        except BlockCorrupt:
            self._check_still_there(slab, slot, block)
            raise

    def read_plain(self, block: StoredBlock) -> None:
        number, slot = block.place
        slab = self.slabs[number]
        slab.read_whole(slot, self._memory.of(slab.slot_bytes))

    def _check_still_there(self, slab: Slab, slot: int, block: StoredBlock) -> None:
        """A live tier may have put another block there since: that is no damage."""
        if self.used_by is None:
            return
        header = slab.read_whole(slot, self._memory.of(slab.slot_bytes))[:HEADER_BYTES]
        try:
            is_other = decode_header(header).key != block.key
        except BlockCorrupt:
            is_other = slab.key_at(slot) != block.key
        if is_other:
            raise BlockMissing("another block took its slot meanwhile")

    # ---- the rest -----------------------------------------------------------------------

    def refuse_if_used(self, what: str) -> None:
        """Raise :class:`StoreUnusable` if a process owns the folder."""
        if (process := owner_process(self.folder)) is not None:
            raise StoreUnusable(f"{self.url} is in use by process {process}: {what}")

    def open_tier(self, capacity_bytes: int = 0) -> SsdTier:
        self.refuse_if_used("it can be read now, but only that process may write to it")
        return open_ssd_tier(self.folder, capacity_bytes or self.slab_bytes)

    def findings(self) -> Findings:
        return ssd_findings(self.folder, self.state, self.slabs.values(), self.notes, self.used_by)

    def counters(self) -> JsonObject | None:
        noted = self.notes.counters()
        return None if noted is None else msgspec.structs.asdict(noted)

    def drop(self, selector: Selector) -> str:
        request = self.notes.request_drop(selector)
        if self.used_by is None:
            return "noted; whoever opens the folder next will not see the blocks"
        end = time.monotonic() + DROP_TIMEOUT_S
        while request.exists():
            if time.monotonic() > end:
                return f"asked of process {self.used_by}, which has not answered in time"
            time.sleep(0.05)
        return f"dropped by process {self.used_by}"

    def collect(self) -> dict[str, int]:
        self.refuse_if_used("it gives room back by itself")
        live: LiveSlots = {}
        for block in self.blocks():
            number, slot = block.place
            live.setdefault(number, set()).add(slot)
        self.close()
        try:
            return collect_folder(self.folder, live)
        except (DirectoryLocked, DirectoryUnusable) as error:
            raise StoreUnusable(str(error)) from error

    def close(self) -> None:
        for slab in self.slabs.values():
            slab.file.close()


def open_ssd_tier(folder: Path, capacity_bytes: int) -> SsdTier:
    """The folder as a tier of one disk; :class:`StoreUnusable` says why not."""
    try:
        return SsdTier(folder, capacity_bytes, lambda: None)
    except (DirectoryLocked, DirectoryUnusable) as error:
        raise StoreUnusable(str(error)) from error


def _label(owner: BlockOwner) -> BlockLabel:
    return BlockLabel(
        namespace_digest=owner.namespace_digest,
        layout=UNLABELLED.layout,
        model_digest=owner.model_digest,
        weight_version=owner.weight_version,
        tenant=owner.tenant,
    )


def _direct_flag(path: Path) -> int:
    """``os.O_DIRECT`` if the file can be opened with it."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return 0
    return os.O_DIRECT
