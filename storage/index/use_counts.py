"""How often keys were used of late, in a few bytes a key: a count-min sketch with aging."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.block import KEY_BYTES, BlockKey

ROWS = 2
COUNTERS_PER_BLOCK = 16
"""In each row: enough that a key seldom shares both of its counters."""
USES_MAX = 15
AGE_AFTER = 8
"""Uses a block, after which all counts are halved."""
_WIDTH_MIN = 1 << 12


class UseCounts:
    """The sketch of TinyLFU (Einziger et al., 2017). It remembers evicted blocks too, and
    so tells a block that returns from one that is new. Keys are digests, so their own bytes
    serve as hashes."""

    def __init__(self) -> None:
        self._counts = np.zeros((ROWS, _WIDTH_MIN), np.uint8)
        self._uses = 0

    def make_room(self, blocks: int) -> None:
        """For so many blocks; what was counted stays."""
        while self._counts.shape[1] < blocks * COUNTERS_PER_BLOCK:
            self._counts = np.tile(self._counts, 2)

    def count(self, keys: Sequence[BlockKey]) -> NDArray[np.int64]:
        """Note one more use of each key; returns how often each was used; shape (len(keys),)."""
        counts, columns = self._counts, self._columns(keys)
        for row in range(ROWS):
            counts[row, columns[row]] += counts[row, columns[row]] < USES_MAX
        uses = self._estimate(columns)
        self._note_uses(len(keys))
        return uses

    def estimate(self, keys: Sequence[BlockKey]) -> NDArray[np.int64]:
        """How often each was used, about; shape (len(keys),)."""
        return self._estimate(self._columns(keys))

    def at_least_once(self, key: BlockKey) -> int:
        """How often the key was used; if never, it is from now on."""
        counts, mask = self._counts, self._counts.shape[1] - 1
        columns = [int.from_bytes(key[8 * r : 8 * r + 8], "little") & mask for r in range(ROWS)]
        uses = min(int(counts[row, column]) for row, column in enumerate(columns))
        if uses:
            return uses
        for row, column in enumerate(columns):
            counts[row, column] += counts[row, column] < USES_MAX
        self._note_uses(1)
        return 1

    def _note_uses(self, uses: int) -> None:
        self._uses += uses
        if self._uses >= self._counts.shape[1] // COUNTERS_PER_BLOCK * AGE_AFTER:
            self._counts >>= 1
            self._uses //= 2

    def _estimate(self, columns: NDArray[np.int64]) -> NDArray[np.int64]:
        picked = [self._counts[row, columns[row]] for row in range(ROWS)]
        return np.minimum(*picked).astype(np.int64)

    def _columns(self, keys: Sequence[BlockKey]) -> NDArray[np.int64]:
        """Shape (ROWS, len(keys))."""
        words = np.frombuffer(b"".join(keys), "<u8").reshape(-1, KEY_BYTES // 8)
        return (words[:, :ROWS] & (self._counts.shape[1] - 1)).astype(np.int64).T
