"""Who may have a block: each distinct set once, under a small number.

Millions of blocks share few sets, so a block costs four bytes of this, and a look-up looks
at a set once for all consecutive blocks that have it.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.block import TierName
from scheduler.rows.names import Names

SetIds = NDArray[np.int32]

NOBODY = 0
"""Number of the empty set."""
REMOTE_BIT = 1


class Holders(msgspec.Struct, frozen=True):
    """Where one block can be had: by agent names in ascending order, and remotely by anyone."""

    dram: tuple[str, ...] = ()
    ssd: tuple[str, ...] = ()
    remote: bool = False

    def tier_at(self, agent: str) -> TierName | None:
        """The fastest tier from which ``agent`` itself can have the block; None if it cannot."""
        if agent in self.dram:
            return TierName.DRAM
        if agent in self.ssd:
            return TierName.SSD
        return TierName.REMOTE if self.remote else None


class HolderSets:
    """Sets as bit masks (remote, then DRAM and SSD of each agent), numbered from 0."""

    def __init__(self) -> None:
        self._masks = [0]
        self._ids = {0: NOBODY}
        self._agents = Names()
        """Numbers of their two bits."""
        self._usable: tuple[frozenset[str], int] | None = None
        """Of the last look-up, while no agent has come or gone: its agents, and their mask."""
        self._decoded: dict[int, Holders | None] = {}
        """By set number, for those agents."""

    def __len__(self) -> int:
        return len(self._masks)

    def bit(self, agent: str, tier: TierName) -> int:
        """Mask of this agent's holding in this tier."""
        if tier is TierName.REMOTE:
            return REMOTE_BIT
        index = self._agents.number_of.get(agent)
        if index is None:
            index = self._agents.number(agent)
            self._usable = None
        return 1 << (1 + 2 * index + (tier is TierName.SSD))

    def local_bits(self, agent: str) -> int:
        """Mask of its DRAM and SSD."""
        return self.bit(agent, TierName.DRAM) | self.bit(agent, TierName.SSD)

    def knows(self, agent: str) -> bool:
        return agent in self._agents.number_of

    def remove(self, agent: str) -> None:
        """Its bits, which no block has any more, are free for another agent."""
        self._agents.remove(agent)
        self._usable = None

    def changed(self, ids: SetIds, bits: int, held: bool) -> SetIds:
        """The same sets with, or without, these bits."""
        starts = run_starts(ids)
        lengths = np.diff(starts, append=len(ids))
        masks = [self._masks[number] for number in ids[starts].tolist()]
        new = [self._id(mask | bits if held else mask & ~bits) for mask in masks]
        return np.repeat(np.array(new, np.int32), lengths)

    def added(self, ids: SetIds, firsts: list[int], bits: list[int]) -> SetIds:
        """The same sets with ``bits[i]`` from index ``firsts[i]`` (ascending from 0) to the next;
        an empty one stays empty."""
        starts = sorted({*run_starts(ids).tolist(), *firsts})
        bit_from, bit, new = dict(zip(firsts, bits, strict=True)), 0, []
        for first, number in zip(starts, ids[starts].tolist(), strict=True):
            bit = bit_from.get(first, bit)
            new.append(self._id(self._masks[number] | bit) if number != NOBODY else NOBODY)
        return np.repeat(np.array(new, np.int32), np.diff(starts, append=len(ids)))

    def without(self, bits: int) -> SetIds:
        """For every set, in the order of their numbers, the set without these bits."""
        return np.array([self._id(mask & ~bits) for mask in self._masks[:]], np.int32)

    def keep(self, used: SetIds) -> SetIds:
        """Forget all sets but these numbers; returns the new number of each old one."""
        kept = sorted({NOBODY, *used.tolist()})
        renumbered = np.zeros(len(self._masks), np.int32)
        renumbered[kept] = np.arange(len(kept))
        self._masks = [self._masks[number] for number in kept]
        self._ids = {mask: number for number, mask in enumerate(self._masks)}
        self._decoded.clear()
        return renumbered

    def seen_by(self, number: int, agents: frozenset[str]) -> Holders | None:
        """What of this set is within ``agents``; None if nothing. Equal sets are one object
        only by chance."""
        usable = self._usable_mask(agents)
        if number not in self._decoded:
            self._decoded[number] = self._decode(self._masks[number] & usable)
        return self._decoded[number]

    def _id(self, mask: int) -> int:
        number = self._ids.setdefault(mask, len(self._masks))
        if number == len(self._masks):
            self._masks.append(mask)
        return number

    def _usable_mask(self, agents: frozenset[str]) -> int:
        if self._usable is not None and self._usable[0] is agents:
            return self._usable[1]
        usable = REMOTE_BIT if agents else 0
        for name in agents.intersection(self._agents.number_of):
            usable |= self.local_bits(name)
        self._usable = agents, usable
        self._decoded.clear()
        return usable

    def _decode(self, mask: int) -> Holders | None:
        names = self._agents.listed
        found: dict[bool, list[str]] = {False: [], True: []}
        rest = mask >> 1
        while rest:
            bit = rest.bit_length() - 1
            rest ^= 1 << bit
            found[bit % 2 == 1].append(names[bit // 2])
        if not mask:
            return None
        return Holders(
            tuple(sorted(found[False])), tuple(sorted(found[True])), bool(mask & REMOTE_BIT)
        )


def run_starts(ids: SetIds) -> NDArray[np.intp]:
    """Indexes at which a run of equal numbers begins."""
    return np.concatenate(([0], np.flatnonzero(ids[1:] != ids[:-1]) + 1))[: len(ids)]
