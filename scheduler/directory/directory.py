"""Which agent holds which block in which tier: the scheduler's soft state.

Agents announce what they gain and lose; nothing here is asked back or stored. A wrong
entry costs a recomputation, never a wrong token, because readers check keys themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.block import BlockKey, TierName
from common.ids import NO_INCARNATION, Incarnation
from common.messages.from_agents import Holding
from scheduler.directory.holder_sets import Holders, run_starts
from scheduler.directory.holder_table import HolderTable
from scheduler.plan import Range


class Run(msgspec.Struct, frozen=True):
    """Consecutive blocks, from block ``first`` of the prompt on, that have the same holders."""

    first: int
    blocks: int
    holders: Holders


class _Stream(msgspec.Struct):
    """Where one agent's announcements stand; ``next_sequence`` is None until a snapshot comes."""

    incarnation: Incarnation
    next_sequence: int | None = None


class Directory:
    """Block key -> holders. Bounded: beyond ``entries_max`` blocks those announced longest ago
    are forgotten, which only makes them misses."""

    def __init__(self, entries_max: int = 10_000_000) -> None:
        self._table = HolderTable(entries_max)
        self._streams: dict[str, _Stream] = {}

    def __len__(self) -> int:
        return len(self._table)

    @property
    def memory_bytes(self) -> int:
        """Of the arrays that grow with the number of blocks."""
        return self._table.memory_bytes

    @property
    def dropped_total(self) -> int:
        """Blocks forgotten because of the bound."""
        return self._table.dropped_total

    def apply(
        self,
        agent: str,
        incarnation: Incarnation,
        sequence: int,
        snapshot: bool,
        changes: Iterable[Holding],
    ) -> bool:
        """Take one announcement of ``agent``.

        False: it is of an older incarnation, or there is a gap before it; nothing was
        changed, and the caller must ask for a snapshot. A snapshot replaces the agent's
        DRAM and SSD holdings; what it says of remote is added, as others upload too.
        """
        stream = self._streams.setdefault(agent, _Stream(incarnation))
        if incarnation < stream.incarnation:
            return False
        if snapshot:
            self._table.clear(self._table.sets.local_bits(agent))
        elif incarnation != stream.incarnation or sequence != stream.next_sequence:
            stream.next_sequence = None
            return False
        stream.incarnation = incarnation
        stream.next_sequence = sequence + 1
        changes = iter(changes)
        while batch := list(islice(changes, self._table.added_max)):
            self._merge(agent, batch)
        return True

    def expect(self, agent: str, keys: Sequence[BlockKey], in_dram: bool) -> None:
        """``agent`` is about to have these blocks in DRAM, or turned out not to.

        So a second request for a block that is being read goes to the same reader, which
        reads it once. What the agent announces later corrects a wrong guess.
        """
        if keys:
            bit = self._table.sets.bit(agent, TierName.DRAM)
            self._table.change_entries(keys, bit, in_dram)

    def expect_read(self, keys: Sequence[BlockKey], ranges: Sequence[Range]) -> None:
        """The same for a plan, whose ``ranges`` cover the first of ``keys``: each agent will
        have its own in DRAM. Cheaper for the list that was looked up last."""
        if ranges:
            table, sets = self._table, self._table.sets
            slots = table.found(keys)[: ranges[-1].first + ranges[-1].blocks]
            bits = [sets.bit(part.agent, TierName.DRAM) for part in ranges]
            firsts = [part.first for part in ranges]
            table.replace(slots, sets.added(table.set_ids(slots), firsts, bits))

    def forget(self, agent: str, incarnation: Incarnation = NO_INCARNATION) -> None:
        """Drop the DRAM and SSD holdings of an agent that died; remote blocks stay.

        Until its next snapshot its announcements are refused, and for ever those of an
        incarnation before ``incarnation``.
        """
        known = self._streams.get(agent)
        self._table.clear(self._table.sets.local_bits(agent))
        newest = max(incarnation, known.incarnation) if known else incarnation
        self._streams[agent] = _Stream(newest)

    def remove(self, agent: str) -> None:
        """The agent has left the cluster: its bits are another's from now on."""
        self._streams.pop(agent, None)
        if self._table.sets.knows(agent):
            self._table.clear(self._table.sets.local_bits(agent), for_good=True)
            self._table.sets.remove(agent)

    def renewed(self, agent: str, incarnation: Incarnation) -> None:
        """The agent runs as ``incarnation``: forget what an earlier one held, unless this one
        has announced something already, which took its place."""
        known = self._streams.get(agent)
        if known is None or known.incarnation < incarnation:
            self.forget(agent, incarnation)

    def lookup(self, keys: Sequence[BlockKey], agents: frozenset[str]) -> list[Run]:
        """Holders of the longest prefix of ``keys`` that ``agents`` can all have.

        Holdings of other agents do not count; the first block that nobody holds ends it.
        """
        if not keys:
            return []
        ids = self._table.set_ids(self._table.find(keys))
        starts = run_starts(ids).tolist()
        runs: list[Run] = []
        for first, end in zip(starts, [*starts[1:], len(keys)], strict=True):
            holders = self._table.sets.seen_by(int(ids[first]), agents)
            if holders is None:
                break
            if runs and runs[-1].holders == holders:
                first = runs.pop().first
            runs.append(Run(first, end - first, holders))
        return runs

    def held(self, keys: Sequence[BlockKey], agents: frozenset[str]) -> NDArray[np.bool_]:
        """Which of the blocks ``agents`` can have; shape (len(keys),)."""
        ids = self._table.set_ids(self._table.find(keys))
        some, index = np.unique(ids, return_inverse=True)
        seen = [self._table.sets.seen_by(number, agents) is not None for number in some.tolist()]
        return np.array(seen, bool)[index]

    # ---- inside -----------------------------------------------------------------------

    def _merge(self, agent: str, changes: list[Holding]) -> None:
        dram: dict[BlockKey, bool] = {}
        ssd: dict[BlockKey, bool] = {}
        remote: dict[BlockKey, bool] = {}
        for change in changes:  # the last word on a block counts; hashing a tier would be slow
            of = change.tier
            last = dram if of is TierName.DRAM else ssd if of is TierName.SSD else remote
            last[change.key] = change.held
        tiers = ((TierName.DRAM, dram), (TierName.SSD, ssd), (TierName.REMOTE, remote))
        for tier, last in tiers:
            bit = self._table.sets.bit(agent, tier)
            for held in (True, False):
                keys = [key for key, is_held in last.items() if is_held is held]
                if keys:
                    self._table.change(keys, bit, held)
        self._table.enforce_bounds()
