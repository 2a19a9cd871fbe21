"""One pack, as a process knows it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.block import KEY_BYTES, BlockKey, BlockLabel
from storage.block_format import HEADER_BYTES
from storage.remote.packs.format import PackContents, Rows, order_of

_ROW_BITS = 32


class Pack:
    """An object with blocks. What it holds never changes; ``live_*`` count those of its blocks
    that the index locates here, and belong to the index's owner."""

    __slots__ = ("path", "order", "nbytes", "rows", "labels", "number", "live_blocks", "live_bytes")

    def __init__(self, path: str, nbytes: int, contents: PackContents) -> None:
        self.path = path
        self.order = order_of(path)
        self.nbytes = nbytes
        self.rows: Rows = contents.rows
        self.labels: list[BlockLabel] = contents.labels
        self.number = -1
        self.live_blocks = 0
        self.live_bytes = 0

    def first_ms(self) -> list[int]:
        """When the first block of each label was written."""
        first = np.full(len(self.labels), np.iinfo(np.int64).max)
        np.minimum.at(first, self.rows["label"], self.rows["written_ms"].astype(np.int64))
        return first.tolist()

    def key(self, row: int) -> BlockKey:
        return BlockKey(self.rows["key"][row].tobytes())

    def keys(self) -> list[BlockKey]:
        """Of every row."""
        raw = self.rows["key"].tobytes()
        return [BlockKey(raw[at : at + KEY_BYTES]) for at in range(0, len(raw), KEY_BYTES)]

    def span(self, row: int) -> tuple[int, int]:
        """First byte of the block's header, and what header and payload take."""
        entry = self.rows[row]
        return int(entry["offset"]), HEADER_BYTES + int(entry["payload_bytes"])

    def stored_bytes(self, rows: NDArray[np.int64]) -> int:
        """Headers and payloads of these rows."""
        return int(self.rows["payload_bytes"][rows].sum()) + HEADER_BYTES * len(rows)

    def label(self, row: int) -> BlockLabel:
        return self.labels[int(self.rows["label"][row])]

    def place(self, row: int) -> int:
        """The number by which an index knows a block of this pack."""
        return self.number << _ROW_BITS | row


def split_place(place: int) -> tuple[int, int]:
    """Number of the pack, and row."""
    return place >> _ROW_BITS, place & (1 << _ROW_BITS) - 1
