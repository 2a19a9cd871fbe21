"""A store as its tools see it: blocks one after the other, whoever else uses the store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import msgspec

from common.block import BlockKey, BlockLabel
from common.json import JsonObject
from storage.block_format import BlockHeader
from storage.index.owners import Selector
from storage.tiers.contract import Tier
from storage.tools.finding import Findings


class StoreUnusable(Exception):
    """The store cannot be looked at, or not changed now; the text says why."""


class StoredBlock(msgspec.Struct, frozen=True):
    """A block that is there by its header's or its index's word; not verified."""

    key: BlockKey
    label: BlockLabel
    payload_bytes: int
    written_ms: int
    """Since 1970; 0 if unknown."""
    where: str
    """For people: file and slot, or object and offset."""
    place: tuple[int, int]
    """For the view."""


class StoreSummary(msgspec.Struct):
    """What a store is and has room for, without looking at its blocks."""

    url: str
    kind: str
    used_by: str | None
    """Number of the process that owns it; None: nobody, or it is shared."""
    capacity_bytes: int = 0
    """0: not bounded."""
    free_disk_bytes: int | None = None
    notes: dict[str, str] = {}


class StoreView(Protocol):
    """Reads only. Raises OSError where the store fails as a whole."""

    url: str

    def summary(self) -> StoreSummary:
        """What it is."""

    def blocks(self) -> Iterator[StoredBlock]:
        """Those that a start, or another agent, would find; in the order in which they lie."""

    def read(self, block: StoredBlock) -> tuple[BlockHeader, memoryview]:
        """The header and the payload, verified; valid until the thread's next call.

        Raises BlockCorrupt or BlockMissing (another version, or gone by now).
        """

    def read_plain(self, block: StoredBlock) -> None:
        """Read the same bytes as :meth:`read`, and look at none of them."""

    def findings(self) -> Findings:
        """What ``doctor`` has to say of it beside its blocks."""

    def counters(self) -> JsonObject | None:
        """What the tier that owns the store has counted; None if it does not say."""

    def open_tier(self, capacity_bytes: int = 0) -> Tier:
        """For writes; raises :class:`StoreUnusable` while another process owns the store.

        ``capacity_bytes``: 0 leaves it at what the store has.
        """

    def drop(self, selector: Selector) -> str:
        """Drop the blocks of some owners; returns what has become of it, for people."""

    def collect(self) -> dict[str, int]:
        """Give back what nothing can read: how much of what. :class:`StoreUnusable` if the
        store's owner does that by itself."""

    def close(self) -> None:
        """Release files and connections."""
