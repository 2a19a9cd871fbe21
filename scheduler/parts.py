"""Hits of models whose state has parts: the longest one that the cluster has whole.

A hit of b blocks needs the blocks, and of each part the objects of the last ones of them
(:meth:`common.block.Part.needed`). Policies see it as so many more blocks behind the hit's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.block import BlockKey, Part, part_key
from scheduler.directory.directory import Directory, Run
from scheduler.hit import Extra, Hit
from scheduler.plan import PartReads, PlanRequest, Range, clipped

AT_ONCE = 256
"""Boundaries that are looked at together, from the longest hit on."""

Flags = NDArray[np.bool_]
Blocks = NDArray[np.int64]
HeldObjects = Callable[[int, Blocks], Flags]
"""Of part number p, for some blocks, ascending: which have an object."""


def longest_hit(blocks: int, spans: Sequence[int], held: HeldObjects) -> int:
    """The greatest b up to ``blocks`` so that of each part, whose span is ``spans[p]`` blocks, the
    objects of the last min(span, b) of b blocks are held; 0 if there is none.

    Snapshots are few, and in many parts: what one part lacks is not asked of the next."""
    end = blocks
    while end > 0:
        first = max(0, end - AT_ONCE)
        ends = np.arange(first + 1, end + 1)
        for number, span in enumerate(spans):
            if len(ends):
                ends = ends[_whole(ends, span, partial(held, number))]
        if len(ends):
            return int(ends[-1])
        end = first
    return 0


def _whole(ends: Blocks, span: int, held: Callable[[Blocks], Flags]) -> Flags:
    """Of ascending ends, which have the objects of their last blocks."""
    if span == 1:
        return held(ends - 1)
    start = max(0, int(ends[0]) - span)
    here = held(np.arange(start, ends[-1]))
    index = np.arange(len(here))
    last_gap = np.maximum.accumulate(np.where(here, -1, index))
    in_a_row = (index - last_gap)[ends - 1 - start]
    return in_a_row >= np.minimum(span, ends)


def _item_bytes(part: Part) -> int:
    return part.layout.block_bytes


class Hits:
    """What one request can have of what is held: ``whole`` is the hit of its blocks alone."""

    def __init__(self, directory: Directory, request: PlanRequest, whole: Hit) -> None:
        self.whole = whole
        self._directory = directory
        self._request = request

    def at_most(self, blocks: int) -> Hit:
        """The longest hit of up to so many blocks, with all of its parts."""
        parts = self._request.parts
        if not parts:
            return self.whole if blocks >= self.whole.blocks else self.whole.leading(blocks)
        spans = [part.span_pages for part in parts]
        blocks = longest_hit(min(blocks, self.whole.blocks), spans, self._held)
        hit, extras = self.whole.leading(blocks), []
        runs, end = list(hit.runs), blocks
        # Of one state there are dozens of parts, most of them of one size: looked up together.
        for item_bytes, alike in groupby(parts if blocks else (), _item_bytes):
            keys: list[BlockKey] = []
            for part in alike:
                extras.append(Extra(end + len(keys), item_bytes))
                keys += self._keys(part, part.needed(blocks))
            found = self._directory.lookup(keys, hit.alive)
            runs += [Run(run.first + end, run.blocks, run.holders) for run in found]
            end += len(keys)
        return msgspec.structs.replace(hit, runs=runs, extras=extras, items=end)

    @property
    def lacking(self) -> str:
        """The kind of the first part because of which the hit is not as long as its blocks; empty
        if there is none."""
        blocks = self.whole.blocks
        for number, part in enumerate(self._request.parts):
            needed = part.needed(blocks)
            if blocks and not self._held(number, np.array(needed)).all():
                return part.kind
        return ""

    def split(self, hit: Hit, ranges: list[Range]) -> tuple[list[Range], list[PartReads]]:
        """A policy's ranges, which cover all of the hit: of its blocks, and of each part's objects
        by the blocks that they belong to."""
        if not self._request.parts or not ranges:
            return ranges, []
        reads = []
        for part, extra in zip(self._request.parts, hit.extras, strict=True):
            needed = part.needed(hit.blocks)
            shift = needed.start - extra.first
            mine = [
                msgspec.structs.replace(each, first=each.first + shift)
                for each in clipped(ranges, extra.first, extra.first + len(needed))
                if each.blocks
            ]
            reads.append(PartReads(part.name, part.span_pages, extra.item_bytes, mine))
        return [each for each in clipped(ranges, 0, hit.blocks) if each.blocks], reads

    def _keys(self, part: Part, blocks: Iterable[int]) -> list[BlockKey]:
        keys = self._request.keys
        return [part_key(part.name, keys[block]) for block in blocks]

    def _held(self, number: int, blocks: Blocks) -> Flags:
        keys = self._keys(self._request.parts[number], blocks.tolist())
        return self._directory.held(keys, self.whole.alive)
