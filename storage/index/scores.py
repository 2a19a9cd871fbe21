"""Which blocks are younger: the time of the last use, and earlier uses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.block import BlockKey
from storage.index.rows import Rows
from storage.index.use_counts import UseCounts

BONUS_PART = 0.3
"""An earlier use makes a block younger by this part of all blocks that are held."""
BONUS_USES_MAX = 4
RETIRED_USES_MAX = 2
"""Stored, and read for the prompt behind which its successor is. One that was used more often has
several successors: prompts part there."""
_RETIRED = 1 << 40
"""Younger by so much is every block that has not retired."""


class Scores:
    """Writes the rows' scores: when the block was last used, counted in uses, plus a bonus for
    earlier uses."""

    def __init__(self, rows: Rows, uses: UseCounts) -> None:
        self._rows = rows
        self._uses = uses
        self._clock = 0

    def add(self, row: int, key: BlockKey) -> None:
        """A new block counts as used now."""
        self._clock += 1
        earlier_uses = min(self._uses.at_least_once(key) - 1, BONUS_USES_MAX)
        bonus = int(BONUS_PART * len(self._rows.of) * earlier_uses)
        self._rows.scores[row] = self._clock + bonus

    def add_many(self, rows: NDArray[np.int64]) -> None:
        """The same of many, the oldest first, but that no use is counted."""
        count = len(rows)
        self._rows.scores[rows] = self._clock + 1 + np.arange(count)
        self._clock += count

    def load(self) -> None:
        """The first row is the oldest, and so on."""
        self._clock = len(self._rows.of)
        self._rows.scores[:] = np.arange(self._clock)

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """See :meth:`storage.index.index.BlockIndex.touch`."""
        if keys:
            self._renew(keys, self._bonus(self._uses.count(keys)))

    def refresh(self, keys: Sequence[BlockKey]) -> None:
        """See :meth:`storage.index.index.BlockIndex.refresh`."""
        if keys:
            of, scores = self._rows.of, self._rows.scores
            in_use = [key for key in keys if key in of and scores[of[key]] >= 0]
            if in_use:
                self._renew(in_use, self._bonus(self._uses.estimate(in_use)))

    def retire(self, keys: Sequence[BlockKey]) -> NDArray[np.int64]:
        """``replaced`` of :meth:`storage.index.index.BlockIndex.touch`; returns the rows."""
        here = [key for key in keys if key in self._rows.of]
        if not here:
            return np.zeros(0, np.int64)
        rows = np.fromiter((self._rows.of[key] for key in here), np.int64, len(here))
        rows = rows[self._uses.estimate(here) <= RETIRED_USES_MAX]
        rows = rows[self._rows.scores[rows] >= 0]
        self._rows.scores[rows] -= _RETIRED
        return rows

    def uses(self, key: BlockKey) -> int:
        """See :meth:`storage.index.index.BlockIndex.uses`."""
        return int(self._uses.estimate([key])[0])

    def _renew(self, keys: Sequence[BlockKey], bonus: NDArray[np.int64]) -> None:
        of = self._rows.of
        rows = np.fromiter((of.get(key, -1) for key in keys), np.int64, len(keys))
        here = rows >= 0
        ages = np.arange(len(keys), 0, -1)  # the first is the youngest
        self._rows.scores[rows[here]] = (self._clock + ages + bonus)[here]
        self._clock += len(keys)

    def _bonus(self, uses: NDArray[np.int64]) -> NDArray[np.int64]:
        earlier = np.clip(uses - 1, 0, BONUS_USES_MAX)
        return (BONUS_PART * len(self._rows.of) * earlier).astype(np.int64)
