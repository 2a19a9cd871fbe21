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
from common.messages import Holding
from scheduler.directory.holder_sets import NOBODY, Holders, HolderSets, SetIds, run_starts
from scheduler.directory.key_table import Fingerprints, KeyTable, Slots, fingerprints
from scheduler.plan import Range

_EVICT_DIVISOR = 16
"""The oldest 1/16 go at once: to find them is a pass over all blocks."""
_CHANGES_AT_ONCE = 1 << 16
_ENTRIES_MIN = 1 << 12
_SETS_MIN = 1 << 16
"""Fewer sets than these are not looked through for unused ones."""


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
    """Block key -> holders: the number of a set of holders for each block.

    22 bytes a block when full (fingerprint 8, set 4, age 4, at a load of 0.73). Bounded:
    beyond ``entries_max`` the blocks announced longest ago are forgotten, which only makes
    them misses.
    """

    def __init__(self, entries_max: int = 10_000_000) -> None:
        if entries_max < 1:
            raise ValueError(f"entries_max must be at least 1, got {entries_max}")
        self._entries_max = entries_max
        self._added_max = max(1, min(entries_max // _EVICT_DIVISOR, _CHANGES_AT_ONCE))
        """New entries between two looks at the bound."""
        self._table = KeyTable(self._capacity(0))
        self._set_ids: SetIds = np.zeros(self._table.slots, np.int32)
        """By slot. A slot whose set is empty is no entry: only its fingerprint is left."""
        self._announced: NDArray[np.uint32] = np.zeros(self._table.slots, np.uint32)
        """By slot, a count of new entries: their order. After 4 billion it begins anew, and the
        next blocks that the bound drops may be younger ones."""
        self._announced_next = 0
        self._entries = 0
        self._sets = HolderSets()
        self._sets_max = _SETS_MIN
        self._looked_up: tuple[Sequence[BlockKey], Slots] = ((), np.empty(0, np.intp))
        """The last list of keys and their slots: a plan is made of one look-up."""
        self._streams: dict[str, _Stream] = {}
        self.dropped_total = 0
        """Blocks forgotten because of the bound."""

    def __len__(self) -> int:
        return self._entries

    @property
    def memory_bytes(self) -> int:
        """Of the arrays that grow with the number of blocks."""
        return self._table.memory_bytes + self._set_ids.nbytes + self._announced.nbytes

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
            self._clear(agent)
        elif incarnation != stream.incarnation or sequence != stream.next_sequence:
            stream.next_sequence = None
            return False
        stream.incarnation = incarnation
        stream.next_sequence = sequence + 1
        changes = iter(changes)
        while batch := list(islice(changes, self._added_max)):
            self._merge(agent, batch)
        return True

    def expect(self, agent: str, keys: Sequence[BlockKey], in_dram: bool) -> None:
        """``agent`` is about to have these blocks in DRAM, or turned out not to.

        So a second request for a block that is being read goes to the same reader, which
        reads it once. What the agent announces later corrects a wrong guess.
        """
        if keys:
            slots = self._known(fingerprints(keys))
            slots = slots[self._set_ids[slots] != NOBODY]
            self._put(slots, self._sets.bit(agent, TierName.DRAM), in_dram)

    def expect_read(self, keys: Sequence[BlockKey], ranges: Sequence[Range]) -> None:
        """The same for a plan, whose ``ranges`` cover the first of ``keys``: each agent will
        have its own in DRAM. Cheaper for the list that was looked up last."""
        if ranges:
            looked_up, slots = self._looked_up
            if keys is not looked_up:
                slots = self._table.find(fingerprints(keys))
            slots = slots[: ranges[-1].first + ranges[-1].blocks]
            ids = np.where(slots < 0, NOBODY, self._set_ids[slots])
            bits = [self._sets.bit(part.agent, TierName.DRAM) for part in ranges]
            ids = self._sets.added(ids, [part.first for part in ranges], bits)
            self._set_ids[slots[slots >= 0]] = ids[slots >= 0]

    def forget(self, agent: str, incarnation: Incarnation = NO_INCARNATION) -> None:
        """Drop the DRAM and SSD holdings of an agent that died; remote blocks stay.

        Until its next snapshot its announcements are refused, and for ever those of an
        incarnation before ``incarnation``.
        """
        known = self._streams.get(agent)
        self._clear(agent)
        newest = max(incarnation, known.incarnation) if known else incarnation
        self._streams[agent] = _Stream(newest)

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
        slots = self._table.find(fingerprints(keys))
        self._looked_up = keys, slots
        ids = np.where(slots < 0, NOBODY, self._set_ids[slots])
        starts = run_starts(ids).tolist()
        runs: list[Run] = []
        for first, end in zip(starts, [*starts[1:], len(keys)], strict=True):
            holders = self._sets.seen_by(int(ids[first]), agents)
            if holders is None:
                break
            if runs and runs[-1].holders == holders:
                first = runs.pop().first
            runs.append(Run(first, end - first, holders))
        return runs

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
            bit = self._sets.bit(agent, tier)
            for held in (True, False):
                keys = [key for key, is_held in last.items() if is_held is held]
                if keys:
                    prints = fingerprints(keys)
                    self._put(self._add(prints) if held else self._known(prints), bit, held)
        self._enforce_bounds()

    def _known(self, prints: Fingerprints) -> Slots:
        slots = self._table.find(prints)
        return slots[slots >= 0]

    def _add(self, prints: Fingerprints) -> Slots:
        """Slots of these; of those that are not there, new ones."""
        slots = self._table.find(prints)
        absent = np.flatnonzero(slots < 0)
        if self._table.taken + len(absent) > self._table.capacity:
            self._pack(len(absent))
            slots = self._table.find(prints)
            absent = np.flatnonzero(slots < 0)
        slots[absent] = self._table.insert(prints[absent])
        return slots

    def _put(self, slots: Slots, bits: int, held: bool) -> None:
        """Change the sets of these entries, and with them which slots are entries."""
        before = self._set_ids[slots]
        after = self._sets.changed(before, bits, held)
        self._set_ids[slots] = after
        new = slots[before == NOBODY] if held else slots[:0]
        count = self._announced_next + np.arange(len(new))
        self._announced[new] = count.astype(np.uint32)
        self._announced_next += len(new)
        self._entries += int(np.count_nonzero(after)) - int(np.count_nonzero(before))

    def _clear(self, agent: str) -> None:
        """One pass over all blocks (some 10 ms a million), at an agent's restart only."""
        self._set_ids = self._sets.without(self._sets.local_bits(agent))[self._set_ids]
        self._entries = int(np.count_nonzero(self._set_ids))

    def _capacity(self, entries: int) -> int:
        return min(max(2 * entries, _ENTRIES_MIN), self._entries_max + self._added_max)

    def _pack(self, more: int) -> None:
        """Leave out the slots that are no entries, and make room for so many more."""
        self._looked_up = (), np.empty(0, np.intp)
        kept = np.flatnonzero(self._set_ids)
        self._table, slots = self._table.resized(kept, self._capacity(len(kept) + more))
        for name in ("_set_ids", "_announced"):
            column = getattr(self, name)
            moved = np.zeros(self._table.slots, column.dtype)
            moved[slots] = column[kept]
            setattr(self, name, moved)

    def _enforce_bounds(self) -> None:
        if self._entries > self._entries_max:
            dropped = self._entries - self._entries_max + self._entries_max // _EVICT_DIVISOR
            entries = np.flatnonzero(self._set_ids)
            age = np.uint32(self._announced_next & 0xFFFFFFFF) - self._announced[entries]
            oldest = entries[np.argpartition(age, len(age) - dropped)[len(age) - dropped :]]
            self._set_ids[oldest] = NOBODY
            self._entries -= dropped
            self.dropped_total += dropped
        if len(self._sets) > self._sets_max:
            used = np.flatnonzero(np.bincount(self._set_ids, minlength=len(self._sets)))
            self._set_ids = self._sets.keep(used.astype(np.int32))[self._set_ids]
            self._sets_max = max(_SETS_MIN, 2 * len(self._sets))
