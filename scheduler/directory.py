"""Which agent holds which block in which tier: the scheduler's soft state.

Agents announce what they gain and lose; nothing here is asked back or stored. A wrong
entry costs a recomputation, never a wrong token, because readers check keys themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from typing import Protocol

import msgspec

from storage.block import BlockKey
from storage.tier import TierName

_REMOTE_BIT = 1
_DECODED_MAX = 4096
_EVICT_DIVISOR = 16
"""The oldest 1/16 go at once: dropping one at a time would rescan the emptied front of the dict."""


class Change(Protocol):
    """A block came to (``held``) or left a tier of the announcing agent."""

    @property
    def key(self) -> BlockKey: ...
    @property
    def tier(self) -> TierName: ...
    @property
    def held(self) -> bool: ...


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


class Run(msgspec.Struct, frozen=True):
    """Consecutive blocks, from block ``first`` of the prompt on, that have the same holders."""

    first: int
    blocks: int
    holders: Holders


class _Stream(msgspec.Struct):
    """Where one agent's announcements stand; ``next_sequence`` is None until a snapshot comes."""

    incarnation: int
    next_sequence: int | None = None


class Directory:
    """Block key -> holders, as one bit mask a block: remote, and DRAM and SSD of each agent.

    100 to 200 bytes a block (32-byte key object, dict slot, mask); 2,000 keys are looked up
    in a few ms. Bounded: beyond ``entries_max`` the blocks announced longest ago are
    forgotten, which only makes them misses.
    """

    def __init__(self, entries_max: int = 4_000_000) -> None:
        if entries_max < 1:
            raise ValueError(f"entries_max must be at least 1, got {entries_max}")
        self._entries_max = entries_max
        self._masks: dict[BlockKey, int] = {}
        self._agents: dict[str, int] = {}
        """Number of each agent's two bits."""
        self._usable: tuple[frozenset[str], int, int] = (frozenset(), 0, 0)
        """Of the last look-up: its agents, how many were known then, and their mask."""
        self._streams: dict[str, _Stream] = {}
        self._decoded: dict[int, Holders] = {}
        self.dropped_total = 0
        """Blocks forgotten because of the bound."""

    def __len__(self) -> int:
        return len(self._masks)

    def apply(
        self,
        agent: str,
        incarnation: int,
        sequence: int,
        snapshot: bool,
        changes: Iterable[Change],
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
        self._merge(agent, changes)
        self._enforce_bound()
        return True

    def expect(self, agent: str, keys: Iterable[BlockKey], in_dram: bool) -> None:
        """``agent`` is about to have these blocks in DRAM, or turned out not to.

        So a second request for a block that is being read goes to the same reader, which
        reads it once. What the agent announces later corrects a wrong guess.
        """
        bit = self._bit(agent, TierName.DRAM)
        for key in keys:
            mask = self._masks.get(key, 0)
            if not mask:
                continue
            if in_dram:
                self._masks[key] = mask | bit
            elif mask & ~bit:
                self._masks[key] = mask & ~bit
            else:
                del self._masks[key]

    def forget(self, agent: str, incarnation: int = 0) -> None:
        """Drop the DRAM and SSD holdings of an agent that died; remote blocks stay.

        Until its next snapshot its announcements are refused, and for ever those of an
        incarnation before ``incarnation``.
        """
        known = self._streams.get(agent)
        self._clear(agent)
        self._streams[agent] = _Stream(max(incarnation, known.incarnation if known else 0))

    def lookup(self, keys: Sequence[BlockKey], agents: frozenset[str]) -> list[Run]:
        """Holders of the longest prefix of ``keys`` that ``agents`` can all have.

        Holdings of other agents do not count; the first block that nobody holds ends it.
        """
        usable = self._usable_mask(agents)
        runs: list[tuple[int, int, int]] = []
        first = 0
        for known, group in groupby(map(self._masks.get, keys)):
            mask = (known or 0) & usable
            if not mask:
                break
            blocks = len(list(group))
            if runs and runs[-1][2] == mask:
                start, before, _ = runs.pop()
                runs.append((start, before + blocks, mask))
            else:
                runs.append((first, blocks, mask))
            first += blocks
        decoded = self._decoded
        return [Run(f, n, decoded.get(mask) or self._decode(mask)) for f, n, mask in runs]

    def _usable_mask(self, agents: frozenset[str]) -> int:
        before, known, usable = self._usable
        if before is not agents or known != len(self._agents):
            usable = _REMOTE_BIT if agents else 0
            for name, index in self._agents.items():
                if name in agents:
                    usable |= 3 << (1 + 2 * index)
            self._usable = agents, len(self._agents), usable
        return usable

    def _bit(self, agent: str, tier: TierName) -> int:
        if tier is TierName.REMOTE:
            return _REMOTE_BIT
        index = self._agents.setdefault(agent, len(self._agents))
        return 1 << (1 + 2 * index + (tier is TierName.SSD))

    def _decode(self, mask: int) -> Holders:
        names = list(self._agents)
        found: dict[bool, list[str]] = {False: [], True: []}
        rest = mask >> 1
        while rest:
            bit = rest.bit_length() - 1
            rest ^= 1 << bit
            found[bit % 2 == 1].append(names[bit // 2])
        holders = Holders(
            tuple(sorted(found[False])), tuple(sorted(found[True])), bool(mask & _REMOTE_BIT)
        )
        if len(self._decoded) >= _DECODED_MAX:
            self._decoded.clear()
        self._decoded[mask] = holders
        return holders

    def _merge(self, agent: str, changes: Iterable[Change]) -> None:
        bits = {tier: self._bit(agent, tier) for tier in TierName}
        masks = self._masks
        for change in changes:
            mask = masks.get(change.key, 0)
            if change.held:
                masks[change.key] = mask | bits[change.tier]
            elif mask & ~bits[change.tier]:
                masks[change.key] = mask & ~bits[change.tier]
            elif mask:
                del masks[change.key]

    def _clear(self, agent: str) -> None:
        """One pass over all blocks (some 0.1 s a million), at an agent's restart only."""
        if agent not in self._agents:
            return
        own = self._bit(agent, TierName.DRAM) | self._bit(agent, TierName.SSD)
        self._masks = {k: m & ~own for k, m in self._masks.items() if m & ~own}

    def _enforce_bound(self) -> None:
        if len(self._masks) <= self._entries_max:
            return
        target = self._entries_max - self._entries_max // _EVICT_DIVISOR
        oldest = list(islice(self._masks, len(self._masks) - target))
        for key in oldest:
            del self._masks[key]
        self.dropped_total += len(oldest)
